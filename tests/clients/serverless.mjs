// The @neondatabase/serverless driver, as published, against one installation: what it does over HTTP and over WebSocket.
// Environment: DATABASE_URL, HTTP_PORT, ENDPOINT, CLIENT_MODULES (where packages are installed), NODE_EXTRA_CA_CERTS.
// Prints a line `<what>: ok` for each.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { report } from "./report.mjs";

const require = createRequire(process.env.CLIENT_MODULES + "/");
const { neon, neonConfig, Pool, Client, NeonDbError, types } = require("@neondatabase/serverless");
const { DATABASE_URL: url, HTTP_PORT: port, ENDPOINT: endpoint } = process.env;

// The whole configuration that it takes to leave the driver's own service.
neonConfig.fetchEndpoint = `https://localhost:${port}/sql`;
neonConfig.wsProxy = `localhost:${port}/v2`;
if (!globalThis.WebSocket) neonConfig.webSocketConstructor = require("ws");

// The same database, named by its host: the proxy finds it in the connection string, or in the WebSocket's address.
const byHost = new URL(url);
byHost.hostname = `${endpoint}.localhost`;
byHost.searchParams.delete("options");

const TYPES = `select 1::int2 a, 2::int4 b, 9007199254740993::int8 c, 1.5::float4 d, 'NaN'::float8 e, 2.50::numeric f, true g,
  'ä"\\'::text h, 'x'::char(3) i, '{"a":[1,null]}'::json j, '{"a": {"b": "c"}}'::jsonb k, array[1,2,null] l,
  array['a b','c"d',null]::text[] m, '\\x00ff'::bytea n, '2020-01-02'::date o, '2020-01-02 03:04:05+00'::timestamptz p,
  '1 day 02:00:00'::interval q, null::text r, '(1,2)'::point s, '[1,5)'::int4range t, array[array[1,2],array[3,4]] u,
  array['{"x":1}'::jsonb] v, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid w, '127.0.0.1'::inet x`;

function checkTypes(row) {
  const { d, e, o, p, q, s, n, ...rest } = row;
  assert.deepEqual(rest, {
    a: 1, b: 2, c: "9007199254740993", f: "2.50", g: true, h: 'ä"\\', i: "x  ", j: { a: [1, null] }, k: { a: { b: "c" } },
    l: [1, 2, null], m: ["a b", 'c"d', null], r: null, t: "[1,5)", u: [[1, 2], [3, 4]], v: [{ x: 1 }],
    w: "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", x: "127.0.0.1",
  });
  assert.equal(d, 1.5);
  assert.ok(Number.isNaN(e));
  assert.ok(o instanceof Date && p.toISOString() === "2020-01-02T03:04:05.000Z");
  assert.deepEqual({ ...q }, { days: 1, hours: 2 });
  assert.deepEqual({ ...s }, { x: 1, y: 2 });
  assert.deepEqual([...n], [0, 255]);
}

const sql = neon(url);
const full = neon(url, { fullResults: true });
const arrays = neon(url, { arrayMode: true });

await report({
  async "http queries"() {
    assert.deepEqual(await sql`select ${1}::int a, ${"x"} b`, [{ a: 1, b: "x" }]);
    assert.deepEqual(await sql.query("select $1::int + $2::int a", [1, 2]), [{ a: 3 }]);
    const where = sql`where n > ${3}`;
    assert.deepEqual(await sql`select n from generate_series(1, 5) n ${where}`, [{ n: 4 }, { n: 5 }]);
    assert.deepEqual(await sql`select 1 as ${sql.unsafe("chosen")}`, [{ chosen: 1 }]);
  },
  async "http types"() {
    checkTypes((await sql.query(TYPES))[0]);
  },
  async "http parameters"() {
    const when = new Date("2020-01-02T03:04:05Z");
    const [row] = await sql`select ${when}::timestamptz a, ${[1, 2, null]}::int[] b, ${["x,y", '"', null]}::text[] c,
      ${{ k: ["v"] }}::jsonb d, ${Buffer.from([0, 255])}::bytea e, ${null}::text f, ${true}::bool g, ${1.25}::numeric h,
      ${12345678901234567890n}::numeric i, ${[[1, 2], [3, 4]]}::int[] j, ${[{ a: 1 }]}::jsonb[] k`;
    assert.equal(row.a.toISOString(), when.toISOString());
    assert.deepEqual([...row.e], [0, 255]);
    const { a, e, ...rest } = row;
    assert.deepEqual(rest, {
      b: [1, 2, null], c: ["x,y", '"', null], d: { k: ["v"] }, f: null, g: true, h: "1.25", i: "12345678901234567890",
      j: [[1, 2], [3, 4]], k: [{ a: 1 }],
    });
  },
  async "http full results and arrays"() {
    const result = await full`select 1 a, 'x'::text a`;
    assert.deepEqual([result.rows, result.rowCount, result.command, result.rowAsArray], [[{ a: "x" }], 1, "SELECT", false]);
    assert.deepEqual(result.fields.map(({ name, dataTypeID }) => [name, dataTypeID]), [["a", 23], ["a", 25]]);
    assert.deepEqual(await arrays`select 1 a, 'x'::text a`, [[1, "x"]]);
    const own = { getTypeParser: (oid) => (oid === 23 ? (text) => `int ${text}` : types.getTypeParser(oid)) };
    assert.deepEqual(await sql.query("select 1 a", [], { types: own }), [{ a: "int 1" }]);
  },
  async "http changes"() {
    assert.equal((await full`drop table if exists serverless_t`).command, "DROP");
    assert.equal((await full`create table serverless_t (a int primary key, b text)`).rowCount, null);
    assert.equal((await full`insert into serverless_t select n, 'r' || n from generate_series(1, 1000) n`).rowCount, 1000);
    assert.equal((await full`update serverless_t set b = 'x' where a <= 10`).rowCount, 10);
    assert.equal((await full`delete from serverless_t where a > 990 returning a`).rows.length, 10);
    assert.equal((await sql`select * from serverless_t`).length, 990);
  },
  async "http errors"() {
    const error = await sql`insert into serverless_t values (1, 'again')`.catch((error) => error);
    assert.ok(error instanceof NeonDbError);
    const { code, severity, detail, schema, table, constraint, routine } = error;
    assert.deepEqual({ code, severity, detail, schema, table, constraint, routine }, {
      code: "23505", severity: "ERROR", detail: "Key (a)=(1) already exists.", schema: "public", table: "serverless_t",
      constraint: "serverless_t_pkey", routine: "_bt_check_unique",
    });
    await assert.rejects(sql.query("select nonsense"), { code: "42703", position: "8" });
    await assert.rejects(neon(url.replace(/:[^:@/]+@/, ":wrong@"))`select 1`, { code: "28P01" });
    await assert.rejects(neon(byHost.href.replace(endpoint, "ep-none"))`select 1`, { code: "28P01" });
  },
  async "http transactions"() {
    const [one, two] = await sql.transaction([sql`select txid_current()::text a`, sql`select txid_current()::text a`]);
    assert.equal(one[0].a, two[0].a);
    await assert.rejects(
      sql.transaction((tx) => [tx`insert into serverless_t values (2000, 'kept?')`, tx`select 1/0`]),
      { code: "22012" },
    );
    assert.deepEqual(await sql`select * from serverless_t where a = 2000`, []);
    const shown = await sql.transaction(
      (tx) => [tx`show transaction_isolation`, tx`show transaction_read_only`, tx`show transaction_deferrable`],
      { isolationLevel: "Serializable", readOnly: true, deferrable: true },
    );
    assert.deepEqual(shown.flatMap(([row]) => Object.values(row)), ["serializable", "on", "on"]);
    for (const isolationLevel of ["ReadUncommitted", "ReadCommitted", "RepeatableRead"]) {
      const [[row]] = await sql.transaction([sql`show transaction_isolation`], { isolationLevel });
      assert.equal(row.transaction_isolation.replace(" ", ""), isolationLevel.toLowerCase());
    }
    await assert.rejects(sql.transaction([sql`delete from serverless_t`], { readOnly: true }), { code: "25006" });
  },
  async "http endpoint by host"() {
    assert.deepEqual(await neon(byHost.href)`select 1 a`, [{ a: 1 }]);
    const pooler = byHost.href.replace(endpoint, `${endpoint}-pooler`);
    assert.deepEqual(await neon(pooler)`select 1 a`, [{ a: 1 }]);
  },
  async "http aborted"() {
    const abort = new AbortController();
    const slow = sql.query("select pg_sleep(30), 'http aborted'", [], { fetchOptions: { signal: abort.signal } });
    setTimeout(() => abort.abort(), 300);
    await assert.rejects(slow);
    const left = () => sql`select 1 from pg_stat_activity where state = 'active' and query like ${"%'http aborted'"}`;
    for (let tries = 0; (await left()).length > 0; tries++) {
      assert.ok(tries < 50, "it still runs");
      await new Promise((done) => setTimeout(done, 100));
    }
  },
  async "http many at once"() {
    const answers = await Promise.all(Array.from({ length: 200 }, (_, n) => sql`select ${n}::int n, pg_sleep(0.01)`));
    assert.deepEqual(answers.map(([row]) => row.n), answers.map((_, n) => n));
  },
});

await report({
  async "websocket pool"() {
    const pool = new Pool({ connectionString: url });
    checkTypes((await pool.query(TYPES)).rows[0]);
    const { rows } = await pool.query("select $1::int a, $2::text b, $3::jsonb c", [1, "ä", { k: 1 }]);
    assert.deepEqual(rows, [{ a: 1, b: "ä", c: { k: 1 } }]);
    const many = await Promise.all(Array.from({ length: 40 }, (_, n) => pool.query("select $1::int n", [n])));
    assert.deepEqual(many.map(({ rows }) => rows[0].n), many.map((_, n) => n));
    await pool.end();
  },
  async "websocket client"() {
    const client = new Client(url);
    await client.connect();
    assert.equal((await client.query({ name: "prepared", text: "select $1::int + 1 a", values: [1] })).rows[0].a, 2);
    assert.equal((await client.query({ name: "prepared", text: "select $1::int + 1 a", values: [2] })).rows[0].a, 3);
    assert.deepEqual((await client.query({ text: "select 1, 2", rowMode: "array" })).rows, [[1, 2]]);
    const several = await client.query("select 1 a; select 2 a");
    assert.deepEqual(several.map(({ rows }) => rows[0].a), [1, 2]);
    const { rows } = await client.query("select repeat('x', 5000000) a");
    assert.equal(rows[0].a.length, 5000000);
    assert.equal((await client.query("select length($1::text) n", ["y".repeat(3000000)])).rows[0].n, 3000000);
    await client.end();
  },
  async "websocket transactions"() {
    for (const address of [url, url.replace(endpoint, `${endpoint}-pooler`)]) {
      const pool = new Pool({ connectionString: address });
      const client = await pool.connect();
      await client.query("begin");
      await client.query("insert into serverless_t values (3000, 'x')");
      await assert.rejects(client.query("select 1/0"), { code: "22012" });
      await client.query("rollback");
      await client.query("begin isolation level serializable");
      await client.query("insert into serverless_t values (3001, 'y')");
      await client.query("commit");
      assert.deepEqual((await client.query("delete from serverless_t where a >= 3000 returning a")).rows, [{ a: 3001 }]);
      client.release();
      await pool.end();
    }
  },
  async "websocket errors"() {
    const wrong = new Client(url.replace(/:[^:@/]+@/, ":wrong@"));
    wrong.on("error", () => {});
    await assert.rejects(wrong.connect().then(() => wrong.query("select 1")), { code: "28P01" });
    const client = new Client(url);
    await client.connect();
    await assert.rejects(client.query("insert into serverless_t values (1, '')"), { code: "23505", constraint: "serverless_t_pkey" });
    assert.equal((await client.query("select 1 a")).rows[0].a, 1);
    await client.end();
  },
  async "websocket listen"() {
    for (const address of [url, url.replace(endpoint, `${endpoint}-pooler`)]) {
      const [listener, notifier] = [new Client(address), new Client(address)];
      await Promise.all([listener.connect(), notifier.connect()]);
      const heard = new Promise((done) => listener.on("notification", done));
      await listener.query("listen news");
      await notifier.query("notify news, 'hello'");
      const { channel, payload } = await heard;
      assert.deepEqual([channel, payload], ["news", "hello"]);
      await Promise.all([listener.end(), notifier.end()]);
    }
  },
  async "websocket copy"() {
    const client = new Client(url);
    await client.connect();
    await client.query("create temp table copied (a int)");
    await new Promise((done, failed) => client.query({
      submit: (connection) => connection.query("copy copied from stdin"),
      handleCopyInResponse(connection) {
        for (let n = 0; n < 1000; n++) connection.sendCopyFromChunk(Buffer.from(`${n}\n`));
        connection.endCopyFrom();
      },
      handleCommandComplete() {},
      handleReadyForQuery: done,
      handleError: failed,
    }));
    assert.equal((await client.query("select sum(a)::int n from copied")).rows[0].n, 499500);
    await client.end();
  },
  async "websocket without pipelining"() {
    neonConfig.pipelineConnect = false;
    const client = new Client(url);
    await client.connect();
    assert.equal((await client.query("select 1 a")).rows[0].a, 1);
    await client.end();
    neonConfig.pipelineConnect = "password";
  },
  async "websocket endpoint by address"() {
    neonConfig.wsProxy = (host) => `localhost:${port}/v2?address=${host}:5432`;
    const pool = new Pool({ connectionString: byHost.href });
    assert.equal((await pool.query("select 1 a")).rows[0].a, 1);
    await pool.end();
    neonConfig.wsProxy = `localhost:${port}/v2`;
  },
  async "queries over the websocket's pool"() {
    neonConfig.poolQueryViaFetch = true;
    // The driver makes a connection string of its own here, without `options`.
    const pool = new Pool({ connectionString: byHost.href });
    assert.deepEqual((await pool.query("select $1::int a", [1])).rows, [{ a: 1 }]);
    assert.equal(pool.totalCount, 0, "it went over HTTP");
    await pool.end();
    neonConfig.poolQueryViaFetch = false;
  },
});
process.exit(0);
