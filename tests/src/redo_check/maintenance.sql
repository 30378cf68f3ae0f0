-- Rows that move, relations that are rewritten, databases, two-phase commits; at last everything is frozen.
CREATE EXTENSION IF NOT EXISTS bloom;
CREATE TABLE blooming (a int, b int);
INSERT INTO blooming SELECT g, g % 97 FROM generate_series(1, 3000) g;
CREATE INDEX blooming_ab ON blooming USING bloom (a, b);
INSERT INTO blooming SELECT g, g % 89 FROM generate_series(1, 3000) g;
DELETE FROM blooming WHERE a % 2 = 0;
VACUUM blooming;

CREATE TABLE moved (id int PRIMARY KEY, k int, v text);
INSERT INTO moved SELECT g, (g * 7919) % 10007, repeat('x', g % 200) FROM generate_series(1, 10000) g;
CREATE INDEX moved_k ON moved (k);
UPDATE moved SET v = v || 'y' WHERE id % 3 = 0;
DELETE FROM moved WHERE id % 5 = 0;
VACUUM moved;
CLUSTER moved USING moved_k;
VACUUM FULL moved;
REINDEX TABLE moved;
REINDEX TABLE CONCURRENTLY moved;
UPDATE moved SET k = k + 1 WHERE id < 500;
CREATE MATERIALIZED VIEW shown AS SELECT * FROM moved;
REFRESH MATERIALIZED VIEW shown;
CREATE TABLE cut (a int);
INSERT INTO cut SELECT generate_series(1, 50000);
DELETE FROM cut WHERE a > 1000;
VACUUM (TRUNCATE) cut;
TRUNCATE cut;
VACUUM FULL pg_class;
VACUUM FULL pg_database;

SELECT pg_replication_origin_create('elsewhere');
SELECT pg_replication_origin_session_setup('elsewhere');
BEGIN;
SELECT pg_replication_origin_xact_setup('0/1234', '2020-02-02 02:02:02Z');
INSERT INTO moved VALUES (-1, 1, 'from elsewhere');
COMMIT;
SELECT pg_replication_origin_session_reset();
SELECT pg_replication_origin_advance('elsewhere', '0/5678');
SELECT pg_replication_origin_drop('elsewhere');
SELECT pg_logical_emit_message(true, 'prefix', 'message');
SELECT pg_create_restore_point('here');
SELECT pg_backup_start('nowhere', true);
SELECT 1 FROM pg_backup_stop(false);
-- Taken up by the checkpointer, in its own time.
ALTER SYSTEM SET full_page_writes = off;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
ALTER SYSTEM SET full_page_writes = on;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
ALTER SYSTEM RESET full_page_writes;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
SELECT pg_switch_wal();

CREATE DATABASE by_wal STRATEGY wal_log;
CREATE DATABASE by_copy STRATEGY file_copy;
CREATE DATABASE copy_of_copy TEMPLATE by_copy STRATEGY wal_log;
DROP DATABASE by_wal;
SET allow_in_place_tablespaces = true;
CREATE TABLESPACE beside LOCATION '';
CREATE TABLE elsewhere TABLESPACE beside AS SELECT g FROM generate_series(1, 1000) g;
ALTER TABLE elsewhere SET TABLESPACE pg_default;
ALTER TABLE elsewhere SET TABLESPACE beside;
CREATE DATABASE in_beside TABLESPACE beside;
DROP DATABASE in_beside;
DROP TABLE elsewhere;
DROP TABLESPACE beside;

BEGIN; CREATE TABLE made_in_2pc (a int); SAVEPOINT s; INSERT INTO made_in_2pc VALUES (1); PREPARE TRANSACTION 'kept';
BEGIN; INSERT INTO cut VALUES (5); PREPARE TRANSACTION 'committed';
BEGIN; CREATE TABLE gone (a int); INSERT INTO gone VALUES (1); PREPARE TRANSACTION 'aborted';
CHECKPOINT;
COMMIT PREPARED 'committed';
ROLLBACK PREPARED 'aborted';

ROLLBACK PREPARED 'kept';
SET vacuum_freeze_min_age = 0;
SET vacuum_freeze_table_age = 0;
SET vacuum_multixact_freeze_min_age = 0;
SET vacuum_multixact_freeze_table_age = 0;
VACUUM FREEZE;
-- Only when every database is frozen can the oldest ids go.
ALTER DATABASE template0 ALLOW_CONNECTIONS true;
