//! Pebble: Let's Encrypt's ACME server for tests, and the name server that it asks.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::sleep;

/// Where a Pebble will be, so that a proxy can be told before it runs. Its name server runs at once.
pub struct PebblePlace {
    dir: TempDir,
    ports: [u16; 4],
    _name_server: Process,
}

/// A running Pebble. It has forgotten everything when it is started again.
pub struct Pebble {
    /// The file with the root of its certificates.
    pub root: PathBuf,
    _process: Process,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl PebblePlace {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let ports = free_ports();
        own_certificate(dir.path());
        let mut name_server = Command::new(program("pebble-challtestsrv"));
        name_server.args(["-dns01", &local(ports[2]), "-management", &local(ports[3]), "-http01", "", "-https01", ""]);
        name_server.args(["-tlsalpn01", "", "-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""]);
        let process = start(&mut name_server, &dir.path().join("name-server.log"));
        Self { dir, ports, _name_server: process }
    }

    /// The URL of its directory.
    pub fn url(&self) -> String {
        format!("https://{}/dir", local(self.ports[0]))
    }

    /// Where it listens when it runs.
    pub fn address(&self) -> String {
        local(self.ports[0])
    }

    /// The authority of its own certificate.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// A program that makes records in its name server, and notes in `calls` what it was called with.
    pub fn dns_hook(&self) -> PathBuf {
        let path = self.dir.path().join("hook");
        let script = format!(
            "#!/bin/bash\nset -eu\necho \"$1 $2\" >> {}\nexec 3<>/dev/tcp/127.0.0.1/{}\n\
             body=\"{{\\\"host\\\":\\\"$2\\\",\\\"value\\\":\\\"$3\\\"}}\"\n\
             if [ $1 = present ]; then path=set-txt; else path=clear-txt; fi\n\
             printf 'POST /%s HTTP/1.0\\r\\nContent-Length: %d\\r\\n\\r\\n%s' $path ${{#body}} \"$body\" >&3\n\
             head -1 <&3 | grep -q ' 200 '\n",
            self.calls().display(),
            self.ports[3],
        );
        fs::write(&path, script).expect("written");
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("set");
        path
    }

    /// What the program was called with, a line for each call.
    pub fn calls(&self) -> PathBuf {
        self.dir.path().join("calls")
    }

    /// Runs it. Proofs by handshake are looked for on `tls_port`; certificates are good for so long.
    pub async fn run(&self, tls_port: u16, lifetime: Duration) -> Pebble {
        let config = self.dir.path().join("pebble.json");
        let settings = json!({"pebble": {
            "listenAddress": local(self.ports[0]), "managementListenAddress": local(self.ports[1]),
            "certificate": self.dir.path().join("server.pem"), "privateKey": self.dir.path().join("server.key"),
            "httpPort": 1, "tlsPort": tls_port, "ocspResponderURL": "", "externalAccountBindingRequired": false,
            "certificateValidityPeriod": lifetime.as_secs(),
        }});
        fs::write(&config, settings.to_string()).expect("written");
        let mut pebble = Command::new(program("pebble"));
        pebble.arg("-config").arg(config).args(["-dnsserver", &local(self.ports[2]), "-strict"]);
        let process = start(pebble.env("PEBBLE_VA_NOSLEEP", "1"), &self.dir.path().join("pebble.log"));
        let ca = reqwest::Certificate::from_pem(&fs::read(self.ca()).expect("written")).expect("a certificate");
        let client = reqwest::Client::builder().tls_certs_only([ca]).no_proxy().build().expect("a client");
        let url = format!("https://{}/roots/0", local(self.ports[1]));
        for _ in 0..100 {
            if let Ok(answer) = client.get(&url).send().await {
                let root = self.dir.path().join(format!("root-{:016x}.pem", rand::random::<u64>()));
                fs::write(&root, answer.bytes().await.expect("a root")).expect("written");
                return Pebble { root, _process: process };
            }
            sleep(Duration::from_millis(100)).await;
        }
        let log = fs::read_to_string(self.dir.path().join("pebble.log")).unwrap_or_default();
        panic!("Pebble does not answer: {log}");
    }
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn free_ports() -> [u16; 4] {
    let listeners = [(); 4].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
    listeners.map(|listener| listener.local_addr().expect("address").port())
}

/// From `scripts/setup.sh acme`, or wherever DORMOUSE_PEBBLE_DIR says.
fn program(name: &str) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
    let unpacked = repository.join("target/tools/pebble/usr/bin");
    std::env::var_os("DORMOUSE_PEBBLE_DIR").map_or(unpacked, PathBuf::from).join(name)
}

fn start(command: &mut Command, log: &Path) -> Process {
    let log = fs::File::create(log).expect("a log");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
    Process(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}; run scripts/setup.sh acme")))
}

/// For Pebble's own address, by an authority of the test's.
fn own_certificate(dir: &Path) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().expect("key");
    let ca = authority.self_signed(&ca_key).expect("made");
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("names");
    let server = params.signed_by(&key, &Issuer::from_params(&authority, &ca_key)).expect("made");
    for (name, text) in [("ca.pem", ca.pem()), ("server.pem", server.pem()), ("server.key", key.serialize_pem())] {
        fs::write(dir.join(name), text).expect("written");
    }
}
