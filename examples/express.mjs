// Express with node-postgres over the pooled host: `DATABASE_URL=… PORT=3000 node express.mjs`.
import fs from "node:fs";
import express from "express";
import pg from "pg";

// Node.js trusts NODE_EXTRA_CA_CERTS, but a connection string's sslmode leaves that out, so the authority is named here.
const ca = fs.readFileSync(process.env.NODE_EXTRA_CA_CERTS, "utf8");
const url = new URL(process.env.DATABASE_URL);
url.searchParams.delete("sslmode");
const pool = new pg.Pool({ connectionString: url.href, ssl: { ca }, max: 5 });
await pool.query("create table if not exists visits (id bigint generated always as identity, page text not null)");

const app = express();
app.post("/visits/:page", async (request, response) => {
  const { rows } = await pool.query("insert into visits (page) values ($1) returning id", [request.params.page]);
  response.status(201).json(rows[0]);
});
app.get("/visits", async (_, response) => {
  const { rows } = await pool.query("select page, count(*)::int as visits from visits group by page order by page");
  response.json(rows);
});
const server = app.listen(Number(process.env.PORT ?? 3000), "127.0.0.1", () => console.log(`listening on ${server.address().port}`));
process.on("SIGTERM", () => server.close(() => pool.end()));
