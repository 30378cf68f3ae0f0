create table items (id bigserial primary key, body text, at timestamptz default '2020-01-01', tags int[]);
insert into items (body, tags) select repeat(md5(i::text), 1 + i % 5), array[i % 7, i % 11] from generate_series(1, 20000) i;
create index on items using gin (tags);
create index on items using hash (body);
create index on items using brin (id);
create index on items (at, id);
create index on items using spgist (body);
create table boxes (b box, p point);
create index on boxes using gist (b);
insert into boxes select box(point(i, i), point(i + 3, i + 5)), point(i, -i) from generate_series(1, 5000) i;
update items set body = body || 'x' where id % 3 = 0;
delete from items where id % 5 = 0;
insert into items (body, tags) select md5(i::text), array[i] from generate_series(1, 5000) i;
create table wide (id int, content text);
alter table wide alter content set storage external;
insert into wide select i, repeat(md5(i::text), 400) from generate_series(1, 200) i;
update wide set content = content || 'y' where id % 4 = 0;
create unlogged table loose (id int primary key, body text);
insert into loose select i, 'u' from generate_series(1, 1000) i;
create table short (id int);
insert into short select generate_series(1, 50000);
create index on short (id);
\connect
vacuum (freeze) items;
\connect
delete from short where id > 100;
\connect
vacuum short;
\connect
insert into short select generate_series(200000, 230000);
\connect
truncate boxes;
\connect
insert into boxes select box(point(i, i), point(i + 1, i + 1)), point(i, i) from generate_series(1, 2000) i;
\connect
create table dropped as select * from items; drop table dropped;
\connect
vacuum full wide;
\connect
vacuum full pg_class;
\connect
cluster items using items_pkey;
\connect
reindex database work;
\connect
begin; insert into short values (-1); savepoint a; insert into short values (-2); rollback to a; insert into short values (-3); commit;
\connect
do $$ begin for i in 1..300 loop begin insert into short values (-i); exception when others then null; end; end loop; end $$;
\connect
begin; insert into short values (-2000); prepare transaction 'done';
\connect
commit prepared 'done';
\connect
create materialized view many as select id % 10 as d, count(*) from items group by 1; refresh materialized view many;
\connect
alter table items add column extra int default 5; alter table items alter body set data type varchar;
\connect
checkpoint;
\connect
update items set extra = id where id % 2 = 0;
\connect
analyze;
