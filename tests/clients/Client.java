// Usual work through JDBC against one address; the address and what is printed are as in client.py.
import java.io.StringReader;
import java.sql.*;
import java.util.Properties;
import org.postgresql.PGConnection;

public class Client {
    interface Work { void run() throws Exception; }

    static Connection connection;

    static void report(String name, Work work) {
        try {
            work.run();
            System.out.println(name + ": ok");
        } catch (Throwable error) {
            error.printStackTrace();
            System.out.println(name + ": " + String.valueOf(error.getMessage()).lines().findFirst().orElse(""));
        }
    }

    static void check(boolean good, String what) {
        if (!good) throw new AssertionError(what);
    }

    static int number(String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(sql)) {
            rows.next();
            return rows.getInt(1);
        }
    }

    static void run(String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) { statement.execute(sql); }
    }

    public static void main(String[] arguments) throws Exception {
        var env = System.getenv();
        Properties properties = new Properties();
        properties.setProperty("user", env.get("PG_USER"));
        properties.setProperty("password", env.get("PG_PASSWORD"));
        properties.setProperty("options", env.get("PG_OPTIONS"));
        if (env.get("PG_CA") != null) {
            properties.setProperty("sslmode", "verify-full");
            properties.setProperty("sslrootcert", env.get("PG_CA"));
        } else {
            properties.setProperty("sslmode", "disable");
        }
        String url = "jdbc:postgresql://" + env.get("PG_HOST") + ":" + env.get("PG_PORT") + "/" + env.get("PG_DATABASE");
        connection = DriverManager.getConnection(url, properties);
        report("types", () -> {
            try (PreparedStatement statement = connection.prepareStatement("select ?::int, ?::text, ?::numeric, array[1,2]")) {
                statement.setInt(1, 1);
                statement.setString(2, "ä");
                statement.setBigDecimal(3, new java.math.BigDecimal("2.5"));
                ResultSet rows = statement.executeQuery();
                rows.next();
                check(rows.getInt(1) == 1 && rows.getString(2).equals("ä"), "values");
                check(((Integer[]) rows.getArray(4).getArray()).length == 2, "an array");
            }
        });
        report("prepared", () -> {
            // From the fifth time on it has a name on the server.
            try (PreparedStatement statement = connection.prepareStatement("select ?::int + 1")) {
                for (int round = 0; round < 20; round++) {
                    statement.setInt(1, round);
                    ResultSet rows = statement.executeQuery();
                    rows.next();
                    check(rows.getInt(1) == round + 1, "round " + round);
                }
            }
        });
        report("transactions", () -> {
            run("drop table if exists java_t");
            run("create table java_t (a int)");
            connection.setAutoCommit(false);
            run("insert into java_t values (1)");
            Savepoint savepoint = connection.setSavepoint();
            try {
                run("insert into java_t values (1/0)");
                check(false, "no error");
            } catch (SQLException error) {
                check(error.getSQLState().equals("22012"), error.getSQLState());
            }
            connection.rollback(savepoint);
            run("insert into java_t values (2)");
            try (PreparedStatement statement = connection.prepareStatement("select generate_series(1, 1000)")) {
                statement.setFetchSize(50);
                ResultSet rows = statement.executeQuery();
                int count = 0;
                while (rows.next()) count++;
                check(count == 1000, "rows of a portal");
            }
            connection.commit();
            connection.setAutoCommit(true);
            check(number("select sum(a) from java_t") == 3, "sum");
        });
        report("pipeline", () -> {
            try (PreparedStatement statement = connection.prepareStatement("insert into java_t values (?)")) {
                for (int number = 0; number < 500; number++) {
                    statement.setInt(1, number);
                    statement.addBatch();
                }
                check(statement.executeBatch().length == 500, "answers");
            }
            check(number("select count(*) from java_t") == 502, "rows");
        });
        report("copy", () -> {
            long rows = connection.unwrap(PGConnection.class).getCopyAPI()
                .copyIn("copy java_t from stdin", new StringReader("1\n".repeat(10000)));
            check(rows == 10000, "rows " + rows);
        });
        report("cancel", () -> {
            try (Statement statement = connection.createStatement()) {
                new Thread(() -> {
                    try {
                        Thread.sleep(300);
                        statement.cancel();
                    } catch (Exception error) {
                        error.printStackTrace();
                    }
                }).start();
                statement.execute("select pg_sleep(30)");
                check(false, "not cancelled");
            } catch (SQLException error) {
                check(error.getSQLState().equals("57014"), error.getSQLState());
            }
        });
        report("settings", () -> {
            run("set timezone = 'Asia/Tokyo'");
            try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery("show timezone")) {
                rows.next();
                check(rows.getString(1).equals("Asia/Tokyo"), rows.getString(1));
            }
            connection.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
            check(connection.getTransactionIsolation() == Connection.TRANSACTION_SERIALIZABLE, "isolation");
        });
        connection.close();
    }
}
