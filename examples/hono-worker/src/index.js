// Hono on Cloudflare's workerd. `/` sends SQL with fetch(), by the serverless driver; `/hyperdrive` connects with pg through a
// Hyperdrive binding.
import { Hono } from "hono";
import { neon, neonConfig } from "@neondatabase/serverless";
import pg from "pg";

const app = new Hono();

app.get("/", async (c) => {
  neonConfig.fetchEndpoint = c.env.SQL_ENDPOINT;
  const sql = neon(c.env.DATABASE_URL);
  const [{ greeting, server }] = await sql`select ${"hello from workerd"} as greeting, current_setting('server_version_num')::int as server`;
  return c.json({ greeting, server });
});

app.get("/hyperdrive", async (c) => {
  const client = new pg.Client({ connectionString: c.env.HYPERDRIVE.connectionString });
  await client.connect();
  try {
    const { rows } = await client.query("select $1::text as greeting", ["hello through Hyperdrive"]);
    return c.json(rows[0]);
  } finally {
    c.executionCtx.waitUntil(client.end());
  }
});

export default app;
