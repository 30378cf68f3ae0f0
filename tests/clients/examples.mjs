// Calls the examples that are modules: `examples.mjs lambda|drizzle|prisma`. Environment as for serverless.mjs, and
// SQL_ENDPOINT, WEBSOCKET_ENDPOINT. Prints a line `<what>: ok` for each.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const examples = process.env.CLIENT_MODULES;
const require = createRequire(examples + "/");
const { neon, neonConfig } = require("@neondatabase/serverless");
const example = (name) => import(pathToFileURL(`${examples}/${name}`));
neonConfig.fetchEndpoint = process.env.SQL_ENDPOINT;
const sql = neon(process.env.DATABASE_URL);

const works = {
  async lambda() {
    const { handler } = await example("lambda.mjs");
    await sql`create table prices (item text primary key, cents int not null)`;
    await sql`insert into prices values ('tea', 250)`;
    const ask = (item) => handler({ pathParameters: { item } });
    assert.deepEqual(await ask("tea"), { statusCode: 200, body: '{"item":"tea","cents":250}' });
    await sql`update prices set cents = 260`;
    assert.equal((await ask("tea")).body, '{"item":"tea","cents":250}', "it is kept for a minute");
    assert.equal((await ask("gold")).statusCode, 404);
    assert.equal((await handler({})).statusCode, 400);
  },
  async drizzle() {
    const { allAccounts, transfer } = await example("drizzle.mjs");
    await sql`create table accounts (name text primary key, cents int not null)`;
    await sql`insert into accounts values ('alice', 100), ('bob', 0)`;
    await transfer("alice", "bob", 30);
    await assert.rejects(transfer("bob", "alice", 1000), /has not got that much/);
    assert.deepEqual(await allAccounts(), [{ name: "alice", cents: 70 }, { name: "bob", cents: 30 }]);
  },
  async prisma() {
    const { prisma, prepare, retag } = await example("prisma/notes.mjs");
    await prepare();
    await prisma.note.createMany({ data: [{ text: "a", tags: ["x", "y"] }, { text: "b", tags: ["z"] }] });
    assert.equal(await retag("x", "w"), 1);
    const notes = await prisma.note.findMany({ orderBy: { text: "asc" }, select: { text: true, tags: true } });
    assert.deepEqual(notes, [{ text: "a", tags: ["w", "y"] }, { text: "b", tags: ["z"] }]);
    assert.equal((await prisma.$queryRaw`select ${1}::int as n`)[0].n, 1);
    await prisma.$disconnect();
  },
};

const name = process.argv[2];
await works[name]();
console.log(`${name}: ok`);
process.exit(0);
