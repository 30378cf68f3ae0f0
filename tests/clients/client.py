"""Usual work of a Python driver against one address: `client.py psycopg|asyncpg|sqlalchemy`.

The address comes in PG_HOST, PG_PORT, PG_USER, PG_PASSWORD, PG_DATABASE, PG_OPTIONS and, for TLS, PG_CA. Prints one line for
each kind of work: its name and `ok`, or what went wrong.
"""

import asyncio
import datetime
import decimal
import os
import ssl
import sys
import threading
import traceback
import uuid

env = os.environ
TYPES = "select 1::int, 2.5::numeric, 'ä'::text, '2020-02-03'::date, array[1,2], '{\"a\":1}'::jsonb, null, $1::uuid"
UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")


def report(name, work):
    try:
        work()
        print(f"{name}: ok", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)


def conninfo():
    tls = f"sslmode=verify-full sslrootcert={env['PG_CA']}" if env.get("PG_CA") else "sslmode=disable"
    return (
        f"host={env['PG_HOST']} port={env['PG_PORT']} user={env['PG_USER']} password={env['PG_PASSWORD']} "
        f"dbname={env['PG_DATABASE']} options='{env['PG_OPTIONS']}' {tls}"
    )


def run_psycopg():
    import psycopg

    conn = psycopg.connect(conninfo(), autocommit=True)

    def types():
        row = conn.execute(TYPES.replace("$1", "%s"), [UUID]).fetchone()
        assert row == (1, decimal.Decimal("2.5"), "ä", datetime.date(2020, 2, 3), [1, 2], {"a": 1}, None, UUID), row

    def prepared():
        conn.prepare_threshold, conn.prepared_max = 1, 3
        for round in range(4):
            for number in range(8):
                row = conn.execute(f"select %s::int + {number}", [round]).fetchone()
                assert row == (round + number,), row

    def transactions():
        conn.execute("drop table if exists py_t")
        conn.execute("create table py_t (a int)")
        with conn.transaction():
            conn.execute("insert into py_t values (1)")
            try:
                with conn.transaction():
                    conn.execute("insert into py_t values (1/0)")
            except psycopg.errors.DivisionByZero:
                pass
            conn.execute("insert into py_t values (2)")
        assert conn.execute("select sum(a) from py_t").fetchone() == (3,)

    def pipeline():
        with conn.pipeline():
            cursors = [conn.execute("select %s::int", [number]) for number in range(50)]
        assert [cursor.fetchone()[0] for cursor in cursors] == list(range(50))
        try:
            with conn.pipeline():
                conn.execute("select 1")
                conn.execute("select 1/0")
                conn.execute("select 2")
            raise AssertionError("no error")
        except psycopg.errors.DivisionByZero:
            pass
        assert conn.execute("select 7").fetchone() == (7,)

    def copy():
        conn.execute("truncate py_t")
        with conn.cursor().copy("copy py_t from stdin") as target:
            for number in range(10000):
                target.write_row([number])
        with conn.cursor().copy("copy py_t to stdout") as source:
            assert sum(1 for _ in source.rows()) == 10000

    def cancel():
        threading.Timer(0.3, conn.cancel).start()
        try:
            conn.execute("select pg_sleep(30)")
            raise AssertionError("not cancelled")
        except psycopg.errors.QueryCanceled:
            pass

    def settings():
        conn.execute("set timezone = 'Asia/Tokyo'")
        assert conn.execute("show timezone").fetchone() == ("Asia/Tokyo",)
        conn.execute("reset timezone")

    for work in [types, prepared, transactions, pipeline, copy, cancel, settings]:
        report(work.__name__, work)


def run_asyncpg():
    import asyncpg

    loop = asyncio.new_event_loop()

    async def connect():
        tls = ssl.create_default_context(cafile=env["PG_CA"]) if env.get("PG_CA") else False
        return await asyncpg.connect(
            host=env["PG_HOST"], port=int(env["PG_PORT"]), user=env["PG_USER"], password=env["PG_PASSWORD"],
            database=env["PG_DATABASE"], ssl=tls, server_settings={"options": env["PG_OPTIONS"]},
        )

    conn = loop.run_until_complete(connect())

    async def types():
        row = await conn.fetchrow(TYPES, UUID)
        assert tuple(row)[:5] == (1, decimal.Decimal("2.5"), "ä", datetime.date(2020, 2, 3), [1, 2]), row
        assert row[7] == UUID, row

    async def prepared():
        statement = await conn.prepare("select $1::int + 1")
        for number in range(20):
            assert await statement.fetchval(number) == number + 1
            assert await conn.fetchval(f"select $1::int + {number}", 1) == number + 1

    async def transactions():
        await conn.execute("drop table if exists py_t; create table py_t (a int)")
        async with conn.transaction():
            await conn.execute("insert into py_t values ($1)", 1)
            try:
                async with conn.transaction():
                    await conn.execute("insert into py_t values (1/0)")
            except asyncpg.DivisionByZeroError:
                pass
            rows = [row async for row in conn.cursor("select generate_series(1, 200)")]
            assert len(rows) == 200
        assert await conn.fetchval("select sum(a) from py_t") == 1

    async def pipeline():
        await conn.executemany("insert into py_t values ($1)", [(number,) for number in range(1000)])
        assert await conn.fetchval("select count(*) from py_t") == 1001

    async def copy():
        await conn.copy_records_to_table("py_t", records=[(number,) for number in range(10000)])
        assert await conn.fetchval("select count(*) from py_t") == 11001

    async def cancel():
        try:
            await conn.fetchval("select pg_sleep(30)", timeout=0.3)
            raise AssertionError("not cancelled")
        except (asyncio.TimeoutError, TimeoutError):
            pass
        assert await conn.fetchval("select 5") == 5

    async def settings():
        await conn.execute("set timezone = 'Asia/Tokyo'")
        assert await conn.fetchval("show timezone") == "Asia/Tokyo"
        await conn.reset()
        assert await conn.fetchval("show timezone") != "Asia/Tokyo"

    for work in [types, prepared, transactions, pipeline, copy, cancel, settings]:
        report(work.__name__, lambda: loop.run_until_complete(asyncio.wait_for(work(), 60)))


def run_sqlalchemy():
    import sqlalchemy as sa
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

    query = {"options": env["PG_OPTIONS"], "sslmode": "disable"}
    if env.get("PG_CA"):
        query.update(sslmode="verify-full", sslrootcert=env["PG_CA"])
    url = sa.URL.create(
        "postgresql+psycopg", env["PG_USER"], env["PG_PASSWORD"], env["PG_HOST"], int(env["PG_PORT"]),
        env["PG_DATABASE"], query,
    )
    engine = sa.create_engine(url, pool_size=3, pool_pre_ping=True)

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "sa_thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        data: Mapped[dict] = mapped_column(sa.JSON)

    def types():
        with engine.connect() as conn:
            assert conn.execute(sa.text("select 1, 'ä', now()")).one()[:2] == (1, "ä")

    def prepared():
        for number in range(12):
            with engine.connect() as conn:
                assert conn.execute(sa.text("select cast(:a as int)"), {"a": number}).scalar() == number

    def transactions():
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add_all([Thing(name=f"n{number}", data={"n": number}) for number in range(500)])
            session.commit()
            session.add(Thing(name="lost", data={}))
            session.rollback()
            assert session.scalar(sa.select(sa.func.count()).select_from(Thing)) == 500

    def settings():
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as conn:
            assert conn.execute(sa.text("show transaction_isolation")).scalar() == "serializable"
        with engine.connect() as conn:
            assert conn.execute(sa.text("show transaction_isolation")).scalar() == "read committed"

    for work in [types, prepared, transactions, settings]:
        report(work.__name__, work)


{"psycopg": run_psycopg, "asyncpg": run_asyncpg, "sqlalchemy": run_sqlalchemy}[sys.argv[1]]()
