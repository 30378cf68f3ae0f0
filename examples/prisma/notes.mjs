// Prisma with its adapter for the serverless driver: sessions in a WebSocket, no TCP and no engine beside Node.js.
import { PrismaNeon } from "@prisma/adapter-neon";
import { neonConfig } from "@neondatabase/serverless";
import { PrismaClient } from "./generated/client.mts";

neonConfig.wsProxy = process.env.WEBSOCKET_ENDPOINT;
export const prisma = new PrismaClient({ adapter: new PrismaNeon({ connectionString: process.env.DATABASE_URL }) });

/** Prisma's migrations need its own engine: where that is not to be had, SQL does as well. */
export const prepare = () =>
  prisma.$executeRaw`create table if not exists "Note" (id serial primary key, text text not null, tags text[] not null)`;

/** Moves all notes with one tag to another; all or none. */
export const retag = (from, to) =>
  prisma.$transaction(async (tx) => {
    const found = await tx.note.findMany({ where: { tags: { has: from } }, orderBy: { id: "asc" } });
    for (const { id, tags } of found) {
      await tx.note.update({ where: { id }, data: { tags: tags.map((tag) => (tag === from ? to : tag)) } });
    }
    return found.length;
  });
