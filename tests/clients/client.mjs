// Usual work of a JavaScript driver against one address: `client.mjs pg|postgres|drizzle`. The address and what is printed
// are as in client.py.
import fs from "node:fs";
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { report } from "./report.mjs";

// Installed apart from this file.
const require = createRequire(process.env.CLIENT_MODULES + "/");
const env = process.env;
const ssl = env.PG_CA ? { ca: fs.readFileSync(env.PG_CA, "utf8") } : false;
const address = { host: env.PG_HOST, port: Number(env.PG_PORT), user: env.PG_USER, password: env.PG_PASSWORD };
const TYPES = "select 1::int a, 2.5::float8 b, 'ä'::text c, array[1,2] d, '{\"a\":1}'::jsonb e, null f, $1::text g";

function newPool() {
  const pg = require("pg");
  return new pg.Pool({ ...address, database: env.PG_DATABASE, options: env.PG_OPTIONS, ssl, max: 5 });
}

async function runPg() {
  const pool = newPool();
  await report({
    async types() {
      const { rows } = await pool.query(TYPES, ["x"]);
      assert.deepEqual(rows[0], { a: 1, b: 2.5, c: "ä", d: [1, 2], e: { a: 1 }, f: null, g: "x" });
    },
    async prepared() {
      const all = Array.from({ length: 40 }, (_, n) => pool.query({ name: `q${n % 4}`, text: `select $1::int + ${n % 4} a`, values: [n] }));
      const answers = await Promise.all(all);
      assert.deepEqual(answers.map((answer) => answer.rows[0].a), answers.map((_, n) => n + (n % 4)));
    },
    async transactions() {
      await pool.query("drop table if exists js_t; create table js_t (a int)");
      const client = await pool.connect();
      await client.query("begin");
      await client.query("insert into js_t values (1)");
      await assert.rejects(client.query("select 1/0"), { code: "22012" });
      await client.query("rollback");
      client.release();
      assert.equal((await pool.query("select count(*)::int n from js_t")).rows[0].n, 0);
    },
    async settings() {
      const client = await pool.connect();
      await client.query("set timezone = 'Asia/Tokyo'");
      assert.equal((await client.query("show timezone")).rows[0].TimeZone, "Asia/Tokyo");
      client.release(true);
    },
  });
  await pool.end();
}

async function runPostgres() {
  const postgres = require("postgres");
  const sql = postgres({ ...address, database: env.PG_DATABASE, ssl, max: 3, connection: { options: env.PG_OPTIONS }, onnotice: () => {} });
  await report({
    async types() {
      const [row] = await sql.unsafe(TYPES, ["x"]);
      assert.deepEqual({ ...row }, { a: 1, b: 2.5, c: "ä", d: [1, 2], e: { a: 1 }, f: null, g: "x" });
    },
    async prepared() {
      const rows = await Promise.all(Array.from({ length: 60 }, (_, n) => sql`select ${n}::int a`));
      assert.deepEqual(rows.map(([row]) => row.a), rows.map((_, n) => n));
    },
    async transactions() {
      await sql`drop table if exists js_t`;
      await sql`create table js_t (a int)`;
      await assert.rejects(sql.begin(async (sql) => {
        await sql`insert into js_t values (1)`;
        await sql`select 1/0`;
      }), { code: "22012" });
      await sql.begin((sql) => [sql`insert into js_t values (2)`, sql`insert into js_t values (3)`]);
      assert.equal((await sql`select sum(a)::int n from js_t`)[0].n, 5);
    },
    async pipeline() {
      const outcomes = await Promise.allSettled([sql`select 1 a`, sql`select 1/0 a`, sql`select 2 a`, sql`select nonsense`, sql`select 3 a`]);
      assert.deepEqual(outcomes.map(({ status }) => status), ["fulfilled", "rejected", "fulfilled", "rejected", "fulfilled"]);
    },
    async copy() {
      const target = await sql`copy js_t from stdin`.writable();
      await new Promise((done, failed) => {
        target.on("error", failed).on("finish", done);
        for (let n = 0; n < 1000; n++) target.write(`${n}\n`);
        target.end();
      });
      assert.equal((await sql`select count(*)::int n from js_t`)[0].n, 1002);
    },
    async cancel() {
      const query = sql`select pg_sleep(30)`;
      setTimeout(() => query.cancel(), 300);
      await assert.rejects(query, { code: "57014" });
    },
    async settings() {
      const own = await sql.reserve();
      await own`set timezone = 'Asia/Tokyo'`;
      assert.equal((await own`show timezone`)[0].TimeZone, "Asia/Tokyo");
      await own`reset timezone`;
      own.release();
    },
  });
  await sql.end({ timeout: 2 });
}

async function runDrizzle() {
  const { drizzle } = require("drizzle-orm/node-postgres");
  const { integer, pgTable, serial, text } = require("drizzle-orm/pg-core");
  const { eq, sql } = require("drizzle-orm");
  const pool = newPool();
  const db = drizzle({ client: pool });
  const things = pgTable("drizzle_t", { id: serial().primaryKey(), name: text(), size: integer() });
  await report({
    async types() {
      assert.equal((await db.execute(sql`select 'ä' a`)).rows[0].a, "ä");
    },
    async prepared() {
      await db.execute(sql`drop table if exists drizzle_t`);
      await db.execute(sql`create table drizzle_t (id serial primary key, name text, size int)`);
      await db.insert(things).values([{ name: "a", size: 1 }, { name: "b", size: 2 }]);
      const byName = db.select().from(things).where(eq(things.name, sql.placeholder("name"))).prepare("by_name");
      for (let n = 0; n < 10; n++) assert.equal((await byName.execute({ name: "b" }))[0].size, 2);
    },
    async transactions() {
      await assert.rejects(db.transaction(async (tx) => {
        await tx.update(things).set({ size: 9 });
        await tx.execute(sql`select 1/0`);
      }));
      assert.deepEqual((await db.select().from(things)).map(({ size }) => size).sort(), [1, 2]);
    },
  });
  await pool.end();
}

await { pg: runPg, postgres: runPostgres, drizzle: runDrizzle }[process.argv[2]]();
