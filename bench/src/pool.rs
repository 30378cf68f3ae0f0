//! The proxy's pool and PgBouncer, in turn, in front of the same compute: `pgbench -S` over 20 server connections, the memory
//! of idle clients, ten thousand that are connected at a time, and what the proxy adds to a direct connection, beside what anything in
//! its place would.

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use e2e::{
    Cluster, ClusterOptions, Project,
    cluster::free_port,
    pg_bin_dir, processes,
    stock::{as_postgres, give_to_postgres, run as run_program},
};
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use tokio_postgres::{Client, Config, NoTls};

use crate::{Samples, peer::median};

/// Server connections of either pool.
const POOL_SIZE: usize = 20;

/// Queries timed one by one for `proxy_added_us`, each round.
const SINGLE_QUERIES: usize = 4000;

/// One way of running `pgbench -S`.
struct Load {
    name: &'static str,
    clients: &'static str,
    /// Of each client, for each second that a round is to last: of the order of what the two do on two cores.
    transactions: u32,
    tls: bool,
    dormouse_protocol: &'static str,
    /// PgBouncer 1.18 has no named statements in transaction mode: there the nearest that works is compared with.
    pgbouncer_protocol: &'static str,
}

const LOADS: &[Load] = &[
    Load::simple("pool1", "1", 4000, false),
    Load::simple("pool50", "50", 300, false),
    Load::simple("pool1000", "1000", 12, false),
    Load::simple("tls", "50", 300, true),
    Load { name: "prepared50", dormouse_protocol: "prepared", pgbouncer_protocol: "extended", ..LOAD50 },
];

const LOAD50: Load = Load::simple("", "50", 300, false);

impl Load {
    const fn simple(name: &'static str, clients: &'static str, transactions: u32, tls: bool) -> Load {
        Load { name, clients, transactions, tls, dormouse_protocol: "simple", pgbouncer_protocol: "simple" }
    }
}

/// A pool in front of the compute.
struct Pool {
    name: &'static str,
    port: u16,
    pid: i32,
    /// `options` of its clients.
    options: Option<String>,
    config: Config,
}

/// PgBouncer; ends when it is dropped.
struct PgBouncer(Child, #[expect(dead_code, reason = "removed when dropped")] tempfile::TempDir);

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Clients that log in at the same time: as many as need not wait for each other's hashing.
const LOGINS_AT_A_TIME: usize = 32;

/// Runs each load `rounds` times through both, in turn, `seconds` each, after opening `idle_clients` through each; then connects
/// `connected_clients` to the proxy's pool.
pub async fn run(rounds: usize, seconds: u32, idle_clients: usize, connected_clients: usize) -> anyhow::Result<()> {
    println!("pool: pgbench -S through the proxy's -pooler host and through PgBouncer, over {POOL_SIZE} connections");
    let environment = vec![("DORMOUSE_POOL_SIZE".to_owned(), POOL_SIZE.to_string())];
    let mut cluster = Cluster::start(ClusterOptions { environment, ..ClusterOptions::default() }).await?;
    let project = awake_project(&cluster).await?;
    let config: Config = project.uri.parse()?;
    let direct = direct(&cluster, &project, &config)?;
    run_program(direct.client("pgbench").args(["-i", "-q", "-s", "10"]))?;
    let (pgbouncer, _running) = start_pgbouncer(&cluster, &project, &config)?;
    let pools = [pgbouncer, dormouse(&cluster, &project, &config)?];

    let mut figures = Vec::new();
    // First: after a load, memory that it left behind would serve the idle clients.
    for (pool, name) in pools.iter().zip(["pgbouncer_client_kb", "client_kb"]) {
        figures.push(format!("{name}={:.1}", pool.memory_of_idle(idle_clients).await?));
    }
    for load in LOADS {
        let mut ratios = Vec::new();
        for round in 0..=rounds {
            // The first round only warms up.
            let seconds = if round == 0 { 1 } else { seconds };
            let [pgbouncer, dormouse] = [pools[0].pgbench(load, seconds)?, pools[1].pgbench(load, seconds)?];
            if round > 0 {
                println!("{} round {round}: pgbouncer {pgbouncer:.0} tps, dormouse {dormouse:.0} tps", load.name);
                ratios.push(dormouse / pgbouncer);
            }
        }
        figures.push(format!("{}_ratio={:.2}", load.name, median(ratios)));
    }
    figures.push(added_us(&cluster, &project, &config, &pools[0], rounds).await?);
    figures.push(pools[1].all_at_once(connected_clients).await?);
    cluster.down().await?;
    println!("{}", figures.join(" "));
    Ok(())
}

/// A project whose compute stays awake.
async fn awake_project(cluster: &Cluster) -> anyhow::Result<Project> {
    let api = cluster.api()?;
    let project = api.create_project("bench").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    api.ok("PATCH".parse()?, &path, Some(json!({"endpoint": {"suspend_timeout_seconds": 604_800}}))).await?;
    api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(60)).await?;
    Ok(project)
}

fn proxy_pid(cluster: &Cluster) -> anyhow::Result<i32> {
    let found = processes::children_with(cluster.up_pid()?, "dormouse proxy");
    Ok(found.first().context("no process of the proxy")?.pid)
}

fn direct(cluster: &Cluster, project: &Project, config: &Config) -> anyhow::Result<Pool> {
    let options = Some(format!("endpoint={}", project.endpoint));
    let pid = proxy_pid(cluster)?;
    Ok(Pool { name: "direct", port: cluster.pg_port(), pid, options, config: config.clone() })
}

fn dormouse(cluster: &Cluster, project: &Project, config: &Config) -> anyhow::Result<Pool> {
    let options = Some(format!("endpoint={}-pooler", project.endpoint));
    Ok(Pool { name: "dormouse", options, ..direct(cluster, project, config)? })
}

/// PgBouncer with the settings that most set, and the proxy's certificate.
fn start_pgbouncer(cluster: &Cluster, project: &Project, config: &Config) -> anyhow::Result<(Pool, PgBouncer)> {
    let program = e2e::repository().join("target/tools/pgbouncer/usr/sbin/pgbouncer");
    ensure!(program.exists(), "{} is missing: run scripts/setup.sh pgbouncer", program.display());
    let home = tempfile::Builder::new().prefix("pgbouncer-").tempdir()?;
    let port = free_port()?;
    let (user, password) = (config.get_user().context("user")?, config.get_password().context("password")?);
    let database = config.get_dbname().context("database")?;
    let socket_dir = cluster.runtime_dir().join(&project.endpoint);
    let certificate = certificate(&cluster.data_dir().join("tls"))?;
    let path = |name: &str| home.path().join(name);
    let ini = format!(
        "[databases]\n{database} = host={host} port=5432 user={user}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
         listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {users}\npool_mode = transaction\n\
         default_pool_size = {POOL_SIZE}\nmax_client_conn = 12000\nignore_startup_parameters = extra_float_digits\n\
         client_tls_sslmode = allow\nclient_tls_key_file = {tls}\nclient_tls_cert_file = {tls}\nlog_connections = 0\n\
         log_disconnections = 0\nlogfile = {log}\n",
        host = socket_dir.display(),
        users = path("users.txt").display(),
        tls = path("tls.pem").display(),
        log = path("log").display(),
    );
    let files = [
        ("pgbouncer.ini", ini),
        ("users.txt", format!("\"{user}\" \"{}\"\n", String::from_utf8_lossy(password))),
        ("tls.pem", certificate),
    ];
    give_to_postgres(home.path())?;
    for (name, content) in files {
        std::fs::write(path(name), content)?;
        give_to_postgres(&path(name))?;
    }
    let mut command = as_postgres(program)?;
    let child = command.arg("-q").arg(path("pgbouncer.ini")).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let pid = child.id() as i32;
    let running = PgBouncer(child, home);
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        ensure!(Instant::now() < deadline, "PgBouncer does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((Pool { name: "pgbouncer", port, pid, options: None, config: config.clone() }, running))
}

/// Key and chain of the proxy's self-made certificate.
fn certificate(dir: &Path) -> anyhow::Result<String> {
    let entries = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let server = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("server-"))
    };
    let path = entries.into_iter().find(server).context("the proxy has no certificate")?;
    Ok(std::fs::read_to_string(path)?)
}

impl Pool {
    /// A program of PostgreSQL's that connects through the pool.
    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(pg_bin_dir().join(program));
        let password = self.config.get_password().map(String::from_utf8_lossy).unwrap_or_default();
        command.envs([("PGHOST", "127.0.0.1"), ("PGPORT", &self.port.to_string()), ("PGPASSWORD", &password)]);
        command.env("PGUSER", self.config.get_user().unwrap_or_default());
        command.env("PGDATABASE", self.config.get_dbname().unwrap_or_default());
        if let Some(options) = &self.options {
            command.env("PGOPTIONS", options);
        }
        command
    }

    /// Transactions per second.
    fn pgbench(&self, load: &Load, seconds: u32) -> anyhow::Result<f64> {
        let protocol = if self.name == "dormouse" { load.dormouse_protocol } else { load.pgbouncer_protocol };
        let mut pgbench = self.client("pgbench");
        pgbench.args(["-S", "-n", "-M", protocol, "-c", load.clients]);
        // Time would run while they connect, so it is the transactions of each that are fixed.
        pgbench.args(["-t", &(load.transactions * seconds).to_string()]);
        pgbench.env("PGSSLMODE", if load.tls { "require" } else { "disable" });
        let said = run_program(&mut pgbench).with_context(|| format!("{} through {}", load.name, self.name))?;
        let line = said
            .lines()
            .find(|line| line.starts_with("tps = "))
            .with_context(|| format!("pgbench says no tps: {said}"))?;
        Ok(line.split_whitespace().nth(2).context("tps")?.parse()?)
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port);
        config
            .user(self.config.get_user().unwrap_or_default())
            .password(self.config.get_password().unwrap_or_default());
        config.dbname(self.config.get_dbname().unwrap_or_default());
        if let Some(options) = &self.options {
            config.options(options);
        }
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Connects so many clients, who all stay, then has each ask something at the same moment.
    async fn all_at_once(&self, count: usize) -> anyhow::Result<String> {
        let begun = Instant::now();
        let connecting = futures::stream::iter(0..count).map(|_| self.connect()).buffer_unordered(LOGINS_AT_A_TIME);
        let clients: Vec<Client> = connecting.try_collect().await?;
        let connected = begun.elapsed();
        let begun = Instant::now();
        let asked = clients.iter().map(|client| async {
            let answer = client.simple_query("select abalance from pgbench_accounts where aid = 1").await;
            answer.is_ok().then(|| begun.elapsed())
        });
        let served: Vec<Duration> = futures::future::join_all(asked).await.into_iter().flatten().collect();
        let slowest = served.iter().max().copied().unwrap_or_default();
        println!(
            "{}: {count} clients connected in {connected:.1?}; all ask at once: {} answered, the last after {slowest:.2?}; {} KiB",
            self.name,
            served.len(),
            resident_kib(self.pid)?
        );
        Ok(format!("connected={count} served={} served_max_ms={:.0}", served.len(), slowest.as_secs_f64() * 1000.0))
    }

    /// KiB of resident memory for each client that has done a query and is idle.
    async fn memory_of_idle(&self, count: usize) -> anyhow::Result<f64> {
        let mut clients = Vec::new();
        // What the first ones cost, the others share.
        for _ in 0..100 {
            clients.push(self.connect().await?);
        }
        let before = resident_kib(self.pid)?;
        for _ in 0..count {
            let client = self.connect().await?;
            client.simple_query("select 1").await?;
            clients.push(client);
        }
        let after = resident_kib(self.pid)?;
        println!("{}: {count} idle clients, {before} KiB before, {after} KiB after", self.name);
        Ok((after.saturating_sub(before)) as f64 / count as f64)
    }
}

fn resident_kib(pid: i32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// Microseconds that a query takes longer than over the compute's own socket, at the median: over a direct connection through the proxy,
/// through PgBouncer, and through a relay that does nothing but read and write.
async fn added_us(
    cluster: &Cluster,
    project: &Project,
    config: &Config,
    pgbouncer: &Pool,
    rounds: usize,
) -> anyhow::Result<String> {
    let socket_dir = cluster.runtime_dir().join(&project.endpoint);
    let relay = start_relay(socket_dir.join(".s.PGSQL.5432"))?;
    let mut plain = Config::new();
    plain.user(config.get_user().unwrap_or_default()).dbname(config.get_dbname().unwrap_or_default());
    let (mut own, mut relayed) = (plain.clone(), plain);
    own.host_path(socket_dir);
    relayed.host("127.0.0.1").port(relay);
    let mut clients = vec![direct(cluster, project, config)?.connect().await?, pgbouncer.connect().await?];
    for config in [relayed, own] {
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        clients.push(client);
    }
    let mut added = [const { Vec::new() }; 3];
    for round in 0..=rounds {
        let mut took = Vec::new();
        for client in &clients {
            took.push(single_us(client).await?);
        }
        let [proxied, bounced, relayed, own] = took[..] else { continue };
        if round > 0 {
            println!(
                "one query: {own:.1} us over the compute's socket, {relayed:.1} through a bare relay, {bounced:.1} through PgBouncer, {proxied:.1} through the proxy"
            );
            [proxied, bounced, relayed].iter().zip(&mut added).for_each(|(time, added)| added.push(time - own));
        }
    }
    let [proxy, bouncer, relay] = added.map(median);
    Ok(format!("proxy_added_us={proxy:.1} pgbouncer_added_us={bouncer:.1} relay_added_us={relay:.1}"))
}

/// The least that can stand between a client and the compute: a thread for each direction, which reads and writes. Its port; it ends
/// with its connections.
fn start_relay(socket: PathBuf) -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (client, _) = listener.accept()?;
        client.set_nodelay(true)?;
        let compute = UnixStream::connect(socket)?;
        let (from, to) = (client.try_clone()?, compute.try_clone()?);
        std::thread::spawn(move || pass(from, to));
        pass(compute, client)
    });
    Ok(port)
}

fn pass(mut from: impl Read, mut to: impl Write) -> std::io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            bytes => to.write_all(&buffer[..bytes])?,
        }
    }
}

async fn single_us(client: &Client) -> anyhow::Result<f64> {
    let statement = client.prepare("select abalance from pgbench_accounts where aid = $1").await?;
    let mut samples = Samples::default();
    let mut taken = Vec::with_capacity(SINGLE_QUERIES);
    for aid in 1..=SINGLE_QUERIES as i32 {
        let begun = Instant::now();
        client.query_one(&statement, &[&aid]).await?;
        taken.push(begun.elapsed());
    }
    taken.sort();
    samples.0 = taken;
    Ok(samples.percentile_ms(50) * 1000.0)
}
