// A handler as function platforms call it: no connection is held between two invocations, and none is needed.
import { neon, neonConfig } from "@neondatabase/serverless";

neonConfig.fetchEndpoint = process.env.SQL_ENDPOINT;
// Prices change rarely: their answer may be a minute old, and five minutes while a newer one is fetched.
neonConfig.fetchFunction = (url, init) =>
  fetch(url, { ...init, headers: { ...init.headers, "Dormouse-Cache": "max-age=60, stale-while-revalidate=300, tag=prices" } });
const sql = neon(process.env.DATABASE_URL);

export async function handler(event) {
  const item = event.pathParameters?.item;
  if (!item) return { statusCode: 400, body: JSON.stringify({ error: "which item?" }) };
  const [price] = await sql`select item, cents from prices where item = ${item}`;
  return price
    ? { statusCode: 200, body: JSON.stringify(price) }
    : { statusCode: 404, body: JSON.stringify({ error: "no such item" }) };
}
