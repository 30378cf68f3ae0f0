-- Every B-tree record.
CREATE TABLE keys (a int, b text);
CREATE INDEX keys_a ON keys (a);
CREATE INDEX keys_b ON keys (b) WITH (deduplicate_items = off);
CREATE INDEX keys_ba ON keys (b, a);
-- Random order: splits everywhere; long keys: several levels.
INSERT INTO keys SELECT (g * 7919) % 30011, md5(g::text) FROM generate_series(1, 30000) g;
INSERT INTO keys SELECT g, repeat(md5((g % 300)::text), 20) FROM generate_series(1, 3000) g;
-- Duplicates: posting lists, made, split by later insertions, shortened, dropped.
CREATE TABLE dups (k int, pad int);
CREATE INDEX dups_k ON dups (k);
INSERT INTO dups SELECT g % 50, g FROM generate_series(1, 30000) g;
DELETE FROM dups WHERE pad % 3 = 0;
VACUUM dups;
-- Freed heap places make pointers that fall inside of existing posting lists.
INSERT INTO dups SELECT g % 50, g FROM generate_series(1, 12000) g;
DELETE FROM dups WHERE k % 2 = 0 AND pad % 4 = 1;
VACUUM dups;
INSERT INTO dups SELECT g % 50, g FROM generate_series(1, 8000) g;
DELETE FROM dups WHERE k < 20;
VACUUM dups;
-- Version churn: deletion of dead entries without a vacuum.
CREATE TABLE churn (id int PRIMARY KEY, n int, k int);
CREATE INDEX churn_n ON churn (n);
CREATE INDEX churn_k ON churn (k);
INSERT INTO churn SELECT g, g, g % 10 FROM generate_series(1, 500) g;
DO $$ BEGIN FOR i IN 1..60 LOOP UPDATE churn SET n = n + 1; COMMIT; PERFORM * FROM churn WHERE n BETWEEN 0 AND 100; END LOOP; END $$;
SET enable_seqscan = off;
SELECT count(*) FROM churn WHERE n > 0;
DO $$ BEGIN FOR i IN 1..20 LOOP DELETE FROM churn WHERE id % 20 = i; INSERT INTO churn SELECT 20 * g + i, g, g % 10 FROM generate_series(1000 * i, 1000 * i + 60) g; COMMIT; END LOOP; END $$;
SELECT count(*) FROM churn WHERE k > 0;
-- Deleting whole ranges empties pages, then whole subtrees.
DELETE FROM keys WHERE a BETWEEN 2000 AND 28000;
VACUUM keys;
VACUUM keys;
INSERT INTO keys SELECT g, md5(g::text) FROM generate_series(1, 10000) g;
DELETE FROM keys;
VACUUM keys;
VACUUM keys;
INSERT INTO keys SELECT g, repeat('z', 500) || g FROM generate_series(1, 3000) g;
REINDEX TABLE keys;
CREATE TABLE deep (t text);
CREATE INDEX deep_t ON deep (t);
INSERT INTO deep SELECT lpad(g::text, 1500, '0') FROM generate_series(1, 1500) g;
DELETE FROM deep WHERE t > lpad('100', 1500, '0') AND t < lpad('1400', 1500, '0');
VACUUM deep;
VACUUM deep;
INSERT INTO deep SELECT lpad(g::text, 1500, '0') FROM generate_series(1, 1500) g;
DELETE FROM deep;
VACUUM deep;
