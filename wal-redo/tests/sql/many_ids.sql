-- More transactions than a clog page (32768) or commit-timestamp page (819) holds, more multixacts than an offsets page (2048) and
-- members than a members page (1636).
CREATE TABLE locked (id int PRIMARY KEY);
INSERT INTO locked SELECT generate_series(1, 2500);
CREATE TABLE noise (a int);
DO $$ BEGIN FOR i IN 1..34000 LOOP INSERT INTO noise VALUES (i); COMMIT; END LOOP; END $$;
DO $$ BEGIN FOR i IN 1..2200 LOOP PERFORM 1 FROM locked WHERE id = i FOR KEY SHARE;
  BEGIN UPDATE locked SET id = id WHERE id = i; EXCEPTION WHEN OTHERS THEN NULL; END; COMMIT; END LOOP; END $$;
BEGIN; DO $$ BEGIN FOR i IN 1..2000 LOOP BEGIN INSERT INTO noise VALUES (i); EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$; COMMIT;
