//! TLS to Postgres, with certificates made here. One test, because the server has one certificate at a time.

use std::{
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use sqlx::postgres::PgConnectOptions;

use crate::{
    certificates::{Authority, Certificate},
    database::{Database, eventually},
    relay::{Relay, command, init},
    topics::Topic,
};

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
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Has the server present the certificate from now on.
fn present(database: &mut Database, folder: &Folder, Certificate { cert, key, .. }: &Certificate) {
    folder.hand_over(cert, 0o600);
    folder.hand_over(key, 0o600);
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
    let options: PgConnectOptions = database.servers.postgres.parse().unwrap();
    let name = &database.name;
    format!("postgres://{name}:{name}@{host}:{}/{name}?{parameters}", options.get_port())
}

/// What `cdc-relay init` says to a connection: its exit code, and its errors.
fn attempt(database: &Database, host: &str, parameters: &str) -> (Option<i32>, String) {
    let url = url(database, host, parameters);
    let mut init = command(database);
    // That it waits for another test's transaction in Kafka is no news here.
    init.arg("init").env("CDC_RELAY_POSTGRES__URL", url).env("CDC_RELAY_LOG__LEVEL", "warn");
    let output = init.output().unwrap();
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
    let (ours, another) = (Authority::new(&folder.0, "ours"), Authority::new(&folder.0, "another"));
    let root = format!("sslrootcert={}", ours.path.display());
    let wrong = format!("sslrootcert={}", another.path.display());

    let good = ours.certificate("localhost", 2099);

    reload(database, "off");
    assert_refused(attempt(database, "localhost", "sslmode=require"), 69, "does not offer TLS");
    assert_eq!(attempt(database, "localhost", "sslmode=prefer").0, Some(0));

    present(database, &folder, &good);
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

    present(database, &folder, &ours.certificate("localhost", 2021));
    assert_refused(attempt(database, "localhost", &format!("sslmode=verify-full&{root}")), 69, "expired");
    present(database, &folder, &good);

    let hba = restore.hba.clone();
    client_certificates(database, &folder, &ours, &another, &hba);
}

/// The role is known by its certificate from here on, and by nothing else.
fn client_certificates(
    database: &mut Database,
    folder: &Folder,
    ours: &Authority,
    another: &Authority,
    (hba, content): &(PathBuf, String),
) {
    let root = format!("sslrootcert={}", ours.path.display());
    let name = database.name.clone();
    folder.hand_over(&ours.path, 0o600);
    database.run(&format!("ALTER SYSTEM SET ssl_ca_file = '{}'", ours.path.display()));
    std::fs::write(hba, format!("hostssl {name} {name} 127.0.0.1/32 cert\n{content}")).unwrap();
    reload(database, "on");
    let Certificate { cert, key, .. } = ours.certificate(&name, 2099);
    let with = format!("sslmode=verify-full&{root}&sslcert={}&sslkey={}", cert.display(), key.display());
    assert_refused(attempt(database, "localhost", &format!("sslmode=verify-full&{root}")), 69, "certificate");
    assert_eq!(attempt(database, "localhost", &with), (Some(0), String::new()));
    for (bad, said) in [
        (another.certificate(&name, 2099), "UnknownCA"),
        (ours.certificate(&name, 2021), "CertificateExpired"),
    ] {
        let bad = format!("{root}&sslcert={}&sslkey={}", bad.cert.display(), bad.key.display());
        let answer = attempt(database, "localhost", &format!("sslmode=verify-full&{bad}"));
        assert!(answer.1.contains("ssl_ca_file"), "{}", answer.1);
        assert_refused(answer, 69, said);
    }
    let absent = format!("sslmode=verify-full&{root}&sslcert=/nowhere&sslkey={}", key.display());
    assert_refused(attempt(database, "localhost", &absent), 64, "/nowhere");

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
