// Drizzle over HTTP, and over the WebSocket where a transaction looks at what it has read.
import { neon, neonConfig, Pool } from "@neondatabase/serverless";
import { eq, sql } from "drizzle-orm";
import { drizzle as drizzleHttp } from "drizzle-orm/neon-http";
import { drizzle as drizzleSocket } from "drizzle-orm/neon-serverless";
import { integer, pgTable, text } from "drizzle-orm/pg-core";

neonConfig.fetchEndpoint = process.env.SQL_ENDPOINT;
neonConfig.wsProxy = process.env.WEBSOCKET_ENDPOINT;

export const accounts = pgTable("accounts", { name: text().primaryKey(), cents: integer().notNull() });

export const http = drizzleHttp({ client: neon(process.env.DATABASE_URL) });

export const allAccounts = () => http.select().from(accounts).orderBy(accounts.name);

/** One transaction: both or neither. */
export async function transfer(from, to, cents) {
  const pool = new Pool({ connectionString: process.env.DATABASE_URL });
  try {
    await drizzleSocket({ client: pool }).transaction(async (tx) => {
      const [source] = await tx.select().from(accounts).where(eq(accounts.name, from)).for("update");
      if (!source || source.cents < cents) throw new Error(`${from} has not got that much`);
      await tx.update(accounts).set({ cents: sql`${accounts.cents} - ${cents}` }).where(eq(accounts.name, from));
      await tx.update(accounts).set({ cents: sql`${accounts.cents} + ${cents}` }).where(eq(accounts.name, to));
    });
  } finally {
    await pool.end();
  }
}
