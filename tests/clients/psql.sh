#!/usr/bin/env bash
# Usual work of psql against one address; the address and what is printed are as in client.py. $1 is psql.
psql=$1
export PGHOST=$PG_HOST PGPORT=$PG_PORT PGUSER=$PG_USER PGPASSWORD=$PG_PASSWORD PGDATABASE=$PG_DATABASE PGOPTIONS=$PG_OPTIONS
if [ -n "${PG_CA:-}" ]; then export PGSSLMODE=verify-full PGSSLROOTCERT=$PG_CA; else export PGSSLMODE=disable; fi

# Runs SQL in one session and compares what it says.
check() {
    local said
    said=$("$psql" -XqAt 2>&1 <<<"$2")
    if [ "$said" = "$3" ]; then echo "$1: ok"; else echo "$1: $(head -1 <<<"$said")"; printf '%s\n' "$said" >&2; fi
}

check types "select 1, 'ä', '2020-02-03'::date, array[1,2]" "1|ä|2020-02-03|{1,2}"
check prepared "prepare p as select \$1::int + 1;
execute p(1);
execute p(2);
deallocate p;" "2
3"
check transactions "set client_min_messages = error;
drop table if exists psql_t;
create table psql_t (a int);
begin;
insert into psql_t values (1);
savepoint s;
select 1/0;
rollback to s;
commit;
select count(*) from psql_t" "ERROR:  division by zero
1"
check copy "copy psql_t from stdin;
2
3
\\.
copy (select a from psql_t order by a) to stdout" "1
2
3"
check settings "set timezone = 'Asia/Tokyo';
show timezone;
reset all;
select current_setting('timezone') <> 'Asia/Tokyo'" "Asia/Tokyo
t"
"$psql" -XqAt -c "select pg_sleep(30)" >/dev/null 2>/tmp/psql-cancel.$$ &
pid=$!
sleep 1
kill -INT $pid
wait $pid
if grep -q "canceling statement due to user request" /tmp/psql-cancel.$$; then echo "cancel: ok"; else echo "cancel: $(head -1 /tmp/psql-cancel.$$)"; fi
rm -f /tmp/psql-cancel.$$
