//! TLS to Postgres, with certificates made here. One test, because the server has one certificate at a time.

use std::{
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use sqlx::postgres::PgConnectOptions;

use crate::{
    database::{Database, eventually, server},
    relay::{Relay, command, init},
    topics::Topic,
};

/// A certificate authority and where its certificate is.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    path: PathBuf,
}

/// The server's folder for this test's files, owned by whoever the server runs as.
struct Folder(PathBuf);

impl Folder {
    fn new(database: &mut Database) -> Self {
        let folder = Path::new(&database.text("SHOW data_directory")).join(format!("tls-{}", database.name));
        std::fs::create_dir(&folder).unwrap();
        let this = Self(folder);
        this.hand_over(&this.0, 0o700);
        this
    }

    fn hand_over(&self, path: &Path, mode: u32) {
        let owner = std::fs::metadata(self.0.parent().unwrap()).unwrap();
        chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        self.hand_over(&path, 0o600);
        path
    }

    fn authority(&self, name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let path = self.write(&format!("{name}.pem"), &params.self_signed(&key).unwrap().pem());
        Authority { issuer: Issuer::new(params, key), path }
    }

    /// A certificate for `name` that ends with `last_year`, and its key.
    fn certificate(&self, by: &Authority, name: &str, last_year: i32) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(last_year, 12, 31);
        let key = KeyPair::generate().unwrap();
        let file = format!("{name}-{last_year}");
        let cert = self.write(&format!("{file}.pem"), &params.signed_by(&key, &by.issuer).unwrap().pem());
        (cert, self.write(&format!("{file}.key"), &key.serialize_pem()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Has the server present the certificate from now on.
fn present(database: &mut Database, (cert, key): &(PathBuf, PathBuf)) {
    database.run(&format!("ALTER SYSTEM SET ssl_cert_file = '{}'", cert.display()));
    database.run(&format!("ALTER SYSTEM SET ssl_key_file = '{}'", key.display()));
    reload(database, "on");
}

/// Reloads the server's configuration and waits until it has taken effect.
fn reload(database: &mut Database, ssl: &str) {
    database.run(&format!("ALTER SYSTEM SET ssl = {ssl}"));
    let before = database.text("SELECT pg_conf_load_time()::text");
    database.run("SELECT pg_reload_conf()");
    eventually("the server has read its configuration", || {
        let loaded = database.text("SELECT pg_conf_load_time()::text") != before;
        (loaded && database.text("SHOW ssl") == ssl).then_some(())
    });
}

fn url(database: &Database, host: &str, parameters: &str) -> String {
    let options: PgConnectOptions = server("TEST_POSTGRES_URL").parse().unwrap();
    let name = &database.name;
    format!("postgres://{name}:{name}@{host}:{}/{name}?{parameters}", options.get_port())
}

/// What `cdc-relay init` says to a connection: its exit code, and its errors.
fn attempt(database: &Database, host: &str, parameters: &str) -> (Option<i32>, String) {
    let url = url(database, host, parameters);
    let output = command(database).arg("init").env("CDC_RELAY_POSTGRES__URL", url).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn assert_refused((code, errors): (Option<i32>, String), expected: i32, said: &str) {
    assert_eq!(code, Some(expected), "{errors}");
    assert!(errors.contains(said), "{errors}");
}

/// Undoes what the test did to the server.
struct Restore {
    database: Database,
    /// `pg_hba.conf`: its path, and what was in it.
    hba: (PathBuf, String),
}

impl Drop for Restore {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.hba.0, &self.hba.1);
        for name in ["ssl", "ssl_cert_file", "ssl_key_file", "ssl_ca_file"] {
            self.database.run(&format!("ALTER SYSTEM RESET {name}"));
        }
        self.database.run("SELECT pg_reload_conf()");
    }
}

#[test]
fn sslmode_means_what_libpq_means_by_it() {
    let mut database = Database::new();
    let hba = PathBuf::from(database.text("SHOW hba_file"));
    let content = std::fs::read_to_string(&hba).unwrap();
    let mut restore = Restore { database, hba: (hba, content) };
    let database = &mut restore.database;
    init(database);
    let folder = Folder::new(database);
    let (ours, another) = (folder.authority("ours"), folder.authority("another"));
    let root = format!("sslrootcert={}", ours.path.display());
    let wrong = format!("sslrootcert={}", another.path.display());

    reload(database, "off");
    assert_refused(attempt(database, "localhost", "sslmode=require"), 69, "does not offer TLS");
    assert_eq!(attempt(database, "localhost", "sslmode=prefer").0, Some(0));

    present(database, &folder.certificate(&ours, "localhost", 2099));
    for good in ["sslmode=prefer", "sslmode=require", "sslmode=disable"] {
        assert_eq!(attempt(database, "127.0.0.1", good), (Some(0), String::new()), "{good}");
    }
    assert_eq!(
        attempt(database, "localhost", &format!("sslmode=verify-full&{root}")),
        (Some(0), String::new())
    );
    assert_eq!(
        attempt(database, "127.0.0.1", &format!("sslmode=verify-ca&{root}")),
        (Some(0), String::new())
    );
    let other_name = attempt(database, "127.0.0.1", &format!("sslmode=verify-full&{root}"));
    assert_refused(other_name, 69, "not valid for name");
    for mode in ["verify-full", "verify-ca", "require"] {
        assert_refused(
            attempt(database, "localhost", &format!("sslmode={mode}&{wrong}")),
            69,
            "UnknownIssuer",
        );
    }
    assert_refused(
        attempt(database, "localhost", "sslmode=verify-full&sslrootcert=/nowhere"),
        64,
        "/nowhere",
    );

    present(database, &folder.certificate(&ours, "localhost", 2021));
    assert_refused(attempt(database, "localhost", &format!("sslmode=verify-full&{root}")), 69, "expired");
    present(database, &folder.certificate(&ours, "localhost", 2099));

    // The role is known by its certificate from here on, and by nothing else.
    let name = database.name.clone();
    database.run(&format!("ALTER SYSTEM SET ssl_ca_file = '{}'", ours.path.display()));
    std::fs::write(&restore.hba.0, format!("hostssl {name} {name} 127.0.0.1/32 cert\n{}", restore.hba.1))
        .unwrap();
    reload(database, "on");
    let (cert, key) = folder.certificate(&ours, &name, 2099);
    let with = format!("sslmode=verify-full&{root}&sslcert={}&sslkey={}", cert.display(), key.display());
    assert_refused(attempt(database, "localhost", &format!("sslmode=verify-full&{root}")), 69, "certificate");
    assert_eq!(attempt(database, "localhost", &with), (Some(0), String::new()));

    let topic = Topic::new(1, &[]);
    let relay = Relay::start(database, &[("CDC_RELAY_POSTGRES__URL", &url(database, "localhost", &with))]);
    database.insert(&topic.kind, 0, 5000);
    topic.read(5000);
    let encrypted = format!(
        "SELECT count(*) FROM pg_stat_replication JOIN pg_stat_ssl USING (pid) WHERE usename = '{name}' AND ssl"
    );
    assert_eq!(database.number(&encrypted), 1);
    relay.stop();
}
