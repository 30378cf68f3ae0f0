\pset format unaligned
\set VERBOSITY terse
-- Heaps of all kinds of rows, toast, updates within and between pages.
create table t (id int primary key, k int, v text, big text);
insert into t select i, i % 97, md5(i::text), null from generate_series(1, 20000) i;
insert into t select i, 0, 'toasted', (select string_agg(md5((i * j)::text), '') from generate_series(1, 400) j) from generate_series(20001, 20100) i;
update t set v = v || 'x' where id % 3 = 0;
delete from t where id % 7 = 0;
select count(*), sum(id), sum(length(v)), sum(length(big)), md5(string_agg(big, ',' order by id)) from t;
-- Command ids within one transaction, over evictions.
begin;
create table c (id int, v int);
declare early cursor for select count(*), sum(v) from c;
insert into c select i, 1 from generate_series(1, 30000) i;
declare middle cursor for select count(*), sum(v) from c;
update c set v = v + 1 where id % 2 = 0;
savepoint s;
delete from c where id % 3 = 0;
select count(*), sum(v) from c;
rollback to s;
select count(*), sum(v) from c;
fetch all early;
fetch all middle;
commit;
select count(*), sum(v) from c;
-- Every index access method.
create table ix (id int, arr int[], p point, r int4range, doc tsvector, txt text);
insert into ix select i, array[i % 100, i % 13], point(i % 100, i / 100), int4range(i, i + 10), to_tsvector('simple', 'word' || (i % 50) || ' common'), md5(i::text) from generate_series(1, 15000) i;
create index ix_btree on ix (id);
create index ix_hash on ix using hash (txt);
create index ix_gin on ix using gin (arr);
create index ix_gin_doc on ix using gin (doc);
create index ix_gist on ix using gist (p);
create index ix_gist_r on ix using gist (r);
create index ix_spgist on ix using spgist (p);
create index ix_spgist_t on ix using spgist (txt);
create index ix_brin on ix using brin (id) with (pages_per_range = 4);
insert into ix select i, array[i % 100, i % 13], point(i % 100, i / 100), int4range(i, i + 10), to_tsvector('simple', 'word' || (i % 50) || ' common'), md5(i::text) from generate_series(15001, 20000) i;
set enable_seqscan = off;
select count(*) from ix where id between 100 and 500;
select id from ix where txt = md5('17001');
select count(*) from ix where arr @> array[42];
select count(*) from ix where doc @@ 'word7 & common';
select count(*) from ix where p <@ box(point(10, 10), point(20, 40));
select count(*) from ix where r && int4range(1000, 1100);
select count(*) from ix where txt >= 'f' and txt < 'f2';
reset enable_seqscan;
delete from ix where id % 5 = 0;
vacuum ix;
vacuum (analyze, freeze) t;
select relname, relallvisible = relpages from pg_class where relname = 't';
update t set k = 5 where id = 1001;
set enable_seqscan = off; set enable_bitmapscan = off;
select count(*) from t where id between 900 and 1100;
reset enable_seqscan; reset enable_bitmapscan;
reindex table ix;
cluster t using t_pkey;
vacuum full ix;
select count(*), sum(id) from ix;
-- Truncation: by command, by vacuum, rolled back, within the creating transaction.
create table tr as select i from generate_series(1, 50000) i;
delete from tr where i > 100;
vacuum tr;
select pg_relation_size('tr') < 100000, count(*) from tr;
insert into tr select generate_series(200, 30000);
select count(*), sum(i) from tr;
begin; truncate tr; insert into tr values (1); rollback;
select count(*) from tr;
truncate tr;
select pg_relation_size('tr'), count(*) from tr;
insert into tr select generate_series(1, 1000);
begin; create table tc (i int primary key); insert into tc select generate_series(1, 5000); truncate tc; insert into tc select generate_series(1, 10); commit;
select count(*), sum(i) from tc;
begin; create table gone as select generate_series(1, 10000) i; create index on gone (i); rollback;
-- Sequences.
create sequence sq cache 1;
select nextval('sq') from generate_series(1, 5);
select setval('sq', 1000); select nextval('sq');
create table ser (id serial primary key, g int generated always as identity);
insert into ser select from generate_series(1, 100);
select max(id), max(g) from ser;
-- Unlogged and temporary relations.
create unlogged table u (id int primary key, v text);
create index on u using gist (int4range(id, id + 1));
create index on u using gin (to_tsvector('simple', v));
insert into u select i, 'v' || i from generate_series(1, 20000) i;
update u set v = v || '!' where id % 2 = 0;
vacuum u;
select count(*), sum(length(v)) from u;
alter table u set logged;
select count(*), sum(length(v)) from u;
create unlogged table u2 as select generate_series(1, 100) i;
create temp table tmp (id int primary key, v text);
insert into tmp select i, md5(i::text) from generate_series(1, 20000) i;
select count(*), min(v) from tmp;
drop table tmp;
-- Databases, both ways.
create database d_wal strategy wal_log;
create database d_file strategy file_copy;
create database d_full template template0 strategy file_copy;
\c d_file
create table x as select i, md5(i::text) m from generate_series(1, 10000) i;
create unlogged table xu as select generate_series(1, 100) i;
create index on x (m);
select count(*), min(m) from x;
\c d_wal
select count(*) from pg_class where relkind = 'r' and relnamespace = 'pg_catalog'::regnamespace;
create table x as select i, md5(i::text) m from generate_series(1, 1000) i;
select count(*), min(m) from x;
\c postgres
checkpoint;
create database d_copy template d_file strategy file_copy;
create database d_copy2 template d_file strategy wal_log;
\c d_copy
select count(*), min(m) from x; select count(*) from xu;
insert into x select i, md5(i::text) from generate_series(1, 3000) i;
select count(*), min(m) from x;
vacuum full x;
\c d_copy2
select count(*), min(m) from x; select count(*) from xu;
\c postgres
select datname, pg_database_size(datname) > 6000000 from pg_database order by 1;
drop database d_file; drop database d_copy; drop database d_wal; drop database d_full;
-- Sizes, comments on catalogs, prepared transactions off, large objects, materialised views, partitions.
select pg_relation_size('ix'), pg_total_relation_size('tc'), pg_indexes_size('tc');
select lo_from_bytea(4242, decode(repeat('ab', 100000), 'hex'));
select length(lo_get(4242)), md5(lo_get(4242));
create materialized view mv as select k, count(*) n from t group by k;
create unique index on mv (k);
refresh materialized view concurrently mv;
select sum(n) from mv;
create table pt (id int, v text) partition by hash (id);
create table pt0 partition of pt for values with (modulus 2, remainder 0);
create table pt1 partition of pt for values with (modulus 2, remainder 1);
insert into pt select i, md5(i::text) from generate_series(1, 10000) i;
select count(*), count(distinct tableoid) from pt;
drop table pt;
alter table ix add column extra int default 7, alter column id type bigint;
select sum(extra), sum(id) from ix;
vacuum;
checkpoint;
create extension amcheck;
select count(*), bool_and(check_all is null) from (
  select case am.amname when 'btree' then bt_index_parent_check(c.oid, true)::text end as check_all
  from pg_class c join pg_am am on am.oid = c.relam where c.relkind = 'i' and am.amname = 'btree' and c.relpersistence <> 't' and c.oid <> 't_pkey'::regclass) x
  where check_all <> '';
select count(*) from pg_class c, verify_heapam(c.oid) v where c.relkind in ('r', 'm') and c.relpersistence <> 't';
select relname, pg_relation_size(oid), pg_relation_size(oid, 'fsm'), pg_relation_size(oid, 'vm') from pg_class where relname in ('t', 'ix', 'tr', 'ser', 'mv', 'u') order by 1;
select relname, pg_relation_size(oid), pg_relation_size(oid, 'fsm'), pg_relation_size(oid, 'vm') from pg_class where relkind in ('r', 't', 'S', 'm') and relname not like 'pg_toast%' order by 1;
select pg_database_size('postgres') - (select sum(pg_relation_size(oid) + pg_relation_size(oid, 'fsm') + pg_relation_size(oid, 'vm') + pg_relation_size(oid, 'init')) from pg_class where not relisshared);
select count(*), sum(id), sum(length(v)), sum(length(big)) from t;
select count(*) from tablesample_missing;
