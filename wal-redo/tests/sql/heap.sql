-- Every heap record. A second session, by dblink, for what one alone cannot do.
CREATE EXTENSION dblink;
CREATE TABLE plain (id int PRIMARY KEY, v int, t text) WITH (fillfactor = 80);
INSERT INTO plain SELECT g, g, repeat('x', g % 50) FROM generate_series(1, 3000) g;
UPDATE plain SET v = v + 1 WHERE id % 3 = 0;
UPDATE plain SET v = v + 1 WHERE id % 3 = 0;
UPDATE plain SET t = t || 'longer than before', id = id + 100000 WHERE id % 7 = 0;
DELETE FROM plain WHERE id % 5 = 0;
SELECT count(*) FROM plain;
VACUUM plain;
INSERT INTO plain SELECT g, g, 'again' FROM generate_series(200000, 200300) g;
UPDATE plain SET v = 0 WHERE id BETWEEN 200000 AND 200100;
DELETE FROM plain WHERE id BETWEEN 200000 AND 200010;
VACUUM (FREEZE) plain;
BEGIN; SELECT * FROM plain WHERE id < 50 FOR UPDATE; COMMIT;
BEGIN; SELECT * FROM plain WHERE id < 60 FOR NO KEY UPDATE; COMMIT;
BEGIN; SELECT * FROM plain WHERE id < 70 FOR SHARE; COMMIT;
BEGIN; SELECT * FROM plain WHERE id < 80 FOR KEY SHARE; SAVEPOINT a; SELECT * FROM plain WHERE id < 90 FOR UPDATE; ROLLBACK TO a; COMMIT;
VACUUM (FREEZE) plain;
INSERT INTO plain VALUES (1, 1, 'dup') ON CONFLICT DO NOTHING;
INSERT INTO plain SELECT g, g, 'conflict' FROM generate_series(2900, 3100) g ON CONFLICT (id) DO UPDATE SET v = plain.v + 1;

-- Two sessions: locks on updated rows, multixacts, an aborted one.
SELECT dblink_connect('other', 'dbname=postgres user=' || current_user || ' host=' || current_setting('unix_socket_directories'));
SELECT dblink_exec('other', 'BEGIN');
SELECT dblink_exec('other', 'UPDATE plain SET v = -1 WHERE id BETWEEN 100 AND 120');
SELECT dblink_exec('other', 'UPDATE plain SET v = -2 WHERE id BETWEEN 100 AND 120');
BEGIN;
SELECT * FROM plain WHERE id BETWEEN 100 AND 120 FOR KEY SHARE;
SELECT dblink_exec('other', 'COMMIT');
COMMIT;
SELECT dblink_exec('other', 'BEGIN');
SELECT * FROM dblink('other', 'SELECT id FROM plain WHERE id BETWEEN 130 AND 160 FOR SHARE') AS r(id int);
BEGIN;
SELECT * FROM plain WHERE id BETWEEN 130 AND 160 FOR SHARE;
SELECT dblink_exec('other', 'COMMIT');
UPDATE plain SET v = 9 WHERE id BETWEEN 130 AND 140;
DELETE FROM plain WHERE id BETWEEN 141 AND 145;
ROLLBACK;
VACUUM (FREEZE) plain;
SELECT dblink_disconnect('other');

-- Bulk loads, pages set all-visible, truncation at the end.
CREATE TABLE bulk (a int, b text);
INSERT INTO bulk SELECT g, 'some text of middling length ' || g FROM generate_series(1, 20000) g;
COPY bulk TO '/dev/null';
CREATE TABLE copied (a int, b text);
CREATE TEMP TABLE lines AS SELECT g AS a, repeat('abc', g % 30) AS b FROM generate_series(1, 5000) g;
COPY lines TO PROGRAM 'cat > bulk_lines' ;
COPY copied FROM 'bulk_lines';
COPY copied FROM 'bulk_lines';
BEGIN; TRUNCATE copied; COPY copied FROM 'bulk_lines' WITH (FREEZE); COMMIT;
UPDATE copied SET b = 'seen' WHERE a % 100 = 1;
VACUUM copied;
COPY copied FROM 'bulk_lines';
VACUUM (FREEZE) bulk;
DELETE FROM bulk WHERE a > 3000;
VACUUM bulk;
INSERT INTO bulk SELECT g, 'after the cut' FROM generate_series(1, 5000) g;
VACUUM bulk;
TRUNCATE bulk;

-- TOAST, wide rows, column changes, rewrites.
CREATE TABLE toasted (id serial PRIMARY KEY, big text, other bytea);
ALTER TABLE toasted ALTER COLUMN big SET STORAGE EXTERNAL;
INSERT INTO toasted (big, other) SELECT repeat(md5(g::text), 300), decode(repeat(md5(g::text), 2 * g), 'hex') FROM generate_series(1, 60) g;
UPDATE toasted SET big = big || 'tail' WHERE id % 4 = 0;
DELETE FROM toasted WHERE id % 9 = 0;
ALTER TABLE toasted ADD COLUMN added int DEFAULT 7;
ALTER TABLE toasted ALTER COLUMN id TYPE bigint;
VACUUM FULL toasted;
CLUSTER toasted USING toasted_pkey;
VACUUM (FREEZE, ANALYZE) toasted;
CREATE TABLE widening (a int PRIMARY KEY, b text);
INSERT INTO widening SELECT g, repeat('w', 1900) FROM generate_series(1, 40) g;
UPDATE widening SET b = b || repeat('n', 1500);
ALTER TABLE widening REPLICA IDENTITY FULL;
UPDATE widening SET a = a + 1000 WHERE a % 2 = 0;
DELETE FROM widening WHERE a % 5 = 0;

-- Rows that move to another partition.
CREATE TABLE parted (k int, v text) PARTITION BY RANGE (k);
CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (100);
CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (100) TO (1000);
INSERT INTO parted SELECT g, 'row' FROM generate_series(0, 199) g;
UPDATE parted SET k = k + 100 WHERE k < 50;

-- HOT chains that get pruned while they grow.
CREATE TABLE hot (id int PRIMARY KEY, n int, pad text) WITH (fillfactor = 50);
INSERT INTO hot SELECT g, 0, repeat('p', 100) FROM generate_series(1, 200) g;
DO $$ BEGIN FOR i IN 1..30 LOOP UPDATE hot SET n = n + 1; COMMIT; END LOOP; END $$;
VACUUM hot;

-- Sequences, subtransactions, prepared transactions, databases.
CREATE SEQUENCE seq CACHE 5;
SELECT nextval('seq') FROM generate_series(1, 200);
SELECT setval('seq', 10000);
ALTER SEQUENCE seq RESTART WITH 5;
SELECT nextval('seq');
DO $$ BEGIN FOR i IN 1..20 LOOP BEGIN INSERT INTO hot VALUES (i, 0, ''); EXCEPTION WHEN unique_violation THEN NULL; END; END LOOP; END $$;
CREATE DATABASE logged STRATEGY wal_log;
CREATE DATABASE copied STRATEGY file_copy;
\c logged
CREATE TABLE here (a int PRIMARY KEY);
INSERT INTO here SELECT generate_series(1, 1000);
VACUUM (FREEZE);
\c copied
CREATE TABLE here (a int PRIMARY KEY);
INSERT INTO here SELECT generate_series(1, 1000);
VACUUM;
\c postgres
CREATE UNLOGGED TABLE unlogged (a int PRIMARY KEY);
INSERT INTO unlogged SELECT generate_series(1, 100);

-- A relation's WAL by fragments of pages.
CREATE EXTENSION bloom;
CREATE TABLE bloomed (a int, b int);
INSERT INTO bloomed SELECT g, g FROM generate_series(1, 2000) g;
CREATE INDEX ON bloomed USING bloom (a, b);
INSERT INTO bloomed SELECT g, g FROM generate_series(1, 2000) g;
DELETE FROM bloomed WHERE a < 1000;
VACUUM bloomed;
