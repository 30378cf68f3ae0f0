-- Records of the other index types.
-- Hash: growth by splits, overflow pages with a bitmap, deletions that squeeze buckets, dead items dropped on insert.
CREATE TABLE hashed (k int, t text);
CREATE INDEX hashed_k ON hashed USING hash (k);
CREATE INDEX hashed_t ON hashed USING hash (t) WITH (fillfactor = 20);
INSERT INTO hashed SELECT g % 4000, md5(g::text) FROM generate_series(1, 20000) g;
INSERT INTO hashed SELECT 7, 'the same' FROM generate_series(1, 5000) g;
INSERT INTO hashed SELECT g, g::text FROM generate_series(1, 5000) g;
DELETE FROM hashed WHERE k % 3 = 0;
VACUUM hashed;
DELETE FROM hashed WHERE k = 7;
VACUUM hashed;
INSERT INTO hashed SELECT g % 100, 'again ' || g FROM generate_series(1, 8000) g;
DELETE FROM hashed WHERE ctid IN (SELECT ctid FROM hashed WHERE random() < 0.7);
VACUUM hashed;
CREATE TABLE hash_churn (id int, k int);
CREATE INDEX hash_churn_k ON hash_churn USING hash (k);
INSERT INTO hash_churn SELECT g, g % 5 FROM generate_series(1, 2000) g;
DELETE FROM hash_churn WHERE id % 2 = 0;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT count(*) FROM hash_churn WHERE k = 1;
SELECT count(*) FROM hash_churn WHERE k = 2;
SELECT count(*) FROM hash_churn WHERE k = 3;
INSERT INTO hash_churn SELECT g, g % 5 FROM generate_series(1, 2000) g;
INSERT INTO hash_churn SELECT g, g FROM generate_series(1, 20000) g;
CREATE UNLOGGED TABLE hash_unlogged (k int);
CREATE INDEX ON hash_unlogged USING hash (k);
RESET enable_seqscan;
RESET enable_bitmapscan;

-- GIN: entry and posting trees, with the pending list and without.
CREATE TABLE inverted (id int, a int[], t tsvector);
CREATE INDEX inverted_a ON inverted USING gin (a) WITH (fastupdate = off);
CREATE INDEX inverted_t ON inverted USING gin (t) WITH (gin_pending_list_limit = 64);
INSERT INTO inverted SELECT g, ARRAY[g % 10, g % 1000, g], to_tsvector('simple', 'common w' || g % 500 || ' x' || g % 30) FROM generate_series(1, 12000) g;
SELECT gin_clean_pending_list('inverted_t');
DELETE FROM inverted WHERE id % 3 = 0;
VACUUM inverted;
INSERT INTO inverted SELECT g, ARRAY[g % 10, g % 7], to_tsvector('simple', 'common again ' || g % 50) FROM generate_series(1, 6000) g;
DELETE FROM inverted WHERE id % 7 <> 0;
VACUUM inverted;
INSERT INTO inverted SELECT g, ARRAY[1, 2, 3], to_tsvector('simple', 'tail') FROM generate_series(1, 30000) g;
DELETE FROM inverted WHERE id BETWEEN 1000 AND 29000;
VACUUM inverted;
VACUUM inverted;
INSERT INTO inverted SELECT g, ARRAY[1, 2, 3], to_tsvector('simple', 'tail') FROM generate_series(1, 3000) g;
CREATE INDEX inverted_late ON inverted USING gin (a);
INSERT INTO inverted SELECT g, ARRAY(SELECT i * g FROM generate_series(1, 40) i), NULL FROM generate_series(1, 300) g;
DELETE FROM inverted;
VACUUM inverted;

-- GiST: splits of leaves, inner pages and the root, deletions of items and pages.
CREATE TABLE searched (id int, p point, b box, r int4range);
CREATE INDEX searched_p ON searched USING gist (p);
CREATE INDEX searched_b ON searched USING gist (b);
CREATE INDEX searched_r ON searched USING gist (r);
INSERT INTO searched SELECT g, point(g % 173, g % 211), box(point(g % 97, g % 89), point(g % 97 + 3, g % 89 + 5)), int4range(g, g + g % 50) FROM generate_series(1, 15000) g;
DELETE FROM searched WHERE id % 2 = 0;
VACUUM searched;
INSERT INTO searched SELECT g, point(g, -g), NULL, 'empty' FROM generate_series(1, 3000) g;
DELETE FROM searched WHERE id BETWEEN 2000 AND 14000;
VACUUM searched;
VACUUM searched;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
DELETE FROM searched WHERE id % 5 = 0;
SELECT count(*) FROM searched WHERE p <@ box(point(-100000, -100000), point(100000, 100000));
SELECT count(*) FROM searched WHERE r && int4range(0, 100000);
INSERT INTO searched SELECT g, point(g % 173, g % 211), box(point(1, 1), point(2, 2)), int4range(g, g + 3) FROM generate_series(1, 6000) g;
RESET enable_seqscan;
RESET enable_bitmapscan;
CREATE TABLE excluded (r int4range, EXCLUDE USING gist (r WITH &&));
INSERT INTO excluded SELECT int4range(g * 10, g * 10 + 5) FROM generate_series(1, 2000) g;
DELETE FROM searched;
VACUUM searched;

-- SP-GiST: quad trees, k-d trees, radix trees.
CREATE TABLE spaced (id int, p point, t text, i inet);
CREATE INDEX spaced_quad ON spaced USING spgist (p);
CREATE INDEX spaced_kd ON spaced USING spgist (p kd_point_ops);
CREATE INDEX spaced_t ON spaced USING spgist (t);
CREATE INDEX spaced_i ON spaced USING spgist (i);
INSERT INTO spaced SELECT g, point((g * 7919) % 10007, (g * 104729) % 10009), 'prefix/' || md5(g::text), ('10.' || g % 256 || '.' || g % 251 || '.' || g % 241)::inet FROM generate_series(1, 12000) g;
INSERT INTO spaced SELECT g, point(5, 5), repeat('long', 200) || g, '10.0.0.1' FROM generate_series(1, 2000) g;
DELETE FROM spaced WHERE id % 3 = 0;
VACUUM spaced;
INSERT INTO spaced SELECT g, point(g, g), 'prefix/other/' || g, NULL FROM generate_series(1, 4000) g;
DELETE FROM spaced WHERE id % 2 = 0;
VACUUM spaced;
INSERT INTO spaced SELECT g, point(-g, g), 'p' || chr(32 + g % 200) || g, '::1' FROM generate_series(1, 4000) g;
DELETE FROM spaced;
VACUUM spaced;
VACUUM spaced;

-- BRIN: insertions, updates in place and elsewhere, a second page of the range map, ranges forgotten.
CREATE TABLE ranged (id int, t text) WITH (fillfactor = 10);
CREATE INDEX ranged_id ON ranged USING brin (id) WITH (pages_per_range = 1, autosummarize = off);
CREATE INDEX ranged_t ON ranged USING brin (t) WITH (pages_per_range = 1);
INSERT INTO ranged SELECT g, 'a' FROM generate_series(1, 40000) g;
SELECT brin_summarize_new_values('ranged_id');
SELECT brin_summarize_new_values('ranged_t');
UPDATE ranged SET id = -id WHERE id % 50 = 0;
UPDATE ranged SET t = repeat('z', 200 + id % 100) WHERE id % 500 = 0;
SELECT brin_desummarize_range('ranged_id', 5);
SELECT brin_desummarize_range('ranged_t', 7);
SELECT brin_summarize_range('ranged_t', 7);
VACUUM ranged;
INSERT INTO ranged SELECT g, 'more' FROM generate_series(1, 40000) g;
SELECT brin_summarize_new_values('ranged_id');
SELECT brin_summarize_new_values('ranged_t');

-- A root that is a leaf is vacuumed in its own way.
CREATE TABLE spaced_little (p point);
CREATE INDEX ON spaced_little USING spgist (p);
INSERT INTO spaced_little SELECT point(g, g) FROM generate_series(1, 50) g;
DELETE FROM spaced_little WHERE p[0] < 30;
VACUUM spaced_little;
