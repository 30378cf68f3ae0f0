// The @neondatabase/serverless driver, as published, with tokens in place of a password.
// Environment: DATABASE_URL (without a password), HTTP_PORT, ANN, BOB, EXPIRED, FORGED (tokens), CLIENT_MODULES (where packages
// are installed), NODE_EXTRA_CA_CERTS. Prints a line `<what>: ok` for each.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { report } from "./report.mjs";

const require = createRequire(process.env.CLIENT_MODULES + "/");
const { neon, neonConfig, Client, NeonDbError } = require("@neondatabase/serverless");
const { DATABASE_URL: url, HTTP_PORT: port, ANN, BOB, EXPIRED, FORGED } = process.env;

neonConfig.fetchEndpoint = `https://localhost:${port}/sql`;

const refused = async (authToken, message) => {
  await assert.rejects(neon(url, { authToken })`select 1`, (error) => {
    assert.ok(error instanceof NeonDbError && error.code === "28P01", error);
    assert.match(error.message, message);
    return true;
  });
};

await report({
  async "a query sees its own rows"() {
    const ann = neon(url, { authToken: ANN });
    const bob = neon(url, { authToken: async () => BOB });
    assert.deepEqual(await ann`select note from notes order by note`, [{ note: "a1" }, { note: "a2" }]);
    assert.deepEqual(await bob`select note from notes`, [{ note: "b1" }]);
    assert.deepEqual(await ann`select current_user as u`, [{ u: "authenticated" }]);
  },
  async "a transaction too"() {
    const ann = neon(url, { authToken: ANN });
    const [inserted, seen] = await ann.transaction([
      ann`insert into notes values ('ann', ${"a3"}) returning note`,
      ann`select count(*)::int as n from notes`,
    ]);
    assert.deepEqual([inserted, seen], [[{ note: "a3" }], [{ n: 3 }]]);
    await assert.rejects(ann`insert into notes values ('bob', 'forged')`, { code: "42501" });
  },
  async "many at once keep apart"() {
    const tokens = { ann: ANN, bob: BOB };
    const asked = Array.from({ length: 60 }, async (_, number) => {
      const subject = number % 2 ? "ann" : "bob";
      const rows = await neon(url, { authToken: tokens[subject] })`select distinct owner from notes`;
      assert.deepEqual(rows, [{ owner: subject }]);
    });
    await Promise.all(asked);
  },
  async "bad tokens are refused"() {
    await refused(FORGED, /password authentication failed/);
    await refused("nonsense", /password authentication failed/);
    await refused(EXPIRED, /has expired/);
  },
  async "a session in a WebSocket"() {
    const Socket = require("ws");
    neonConfig.wsProxy = `localhost:${port}/v2`;
    neonConfig.webSocketConstructor = class extends Socket {
      constructor(address) {
        super(address, { headers: { Authorization: `Bearer ${BOB}` } });
      }
    };
    const client = new Client(url);
    await client.connect();
    assert.deepEqual((await client.query("select note from notes")).rows, [{ note: "b1" }]);
    await client.end();
  },
});

// A session that a failure has left open would keep the program going.
process.exit(0);
