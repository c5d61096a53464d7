//! A primary and a standby of a test's own, made as an operator would: the standby is a cold copy.

use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection as _, PgConnection, Row as _};

use crate::{
    database::{Database, Servers, eventually, server},
    relay::command,
    stack::folder,
    topics::Topic,
};

/// A setting's name and value.
pub(crate) type Setting<'a> = (&'a str, &'a str);

/// What a standby needs so that slots are synchronised to it; `sync_replication_slots` stays off, so that a test
/// decides when.
pub(crate) const READY: [Setting<'_>; 2] =
    [("primary_slot_name", "standby1"), ("hot_standby_feedback", "on")];

/// Where the test run's Postgres has its programs, its version, and as whom it runs.
struct Installation {
    bin: PathBuf,
    /// Postgres refuses root.
    user: Option<(u32, u32)>,
}

impl Installation {
    fn find() -> Self {
        let shared = server("TEST_POSTGRES_URL");
        let bin = ask(&shared, "SELECT setting FROM pg_config() WHERE name = 'BINDIR'").unwrap();
        let data = fs::metadata(ask(&shared, "SHOW data_directory").unwrap()).unwrap();
        let is_root = rustix::process::geteuid().is_root();
        Self { bin: bin.into(), user: is_root.then(|| (data.uid(), data.gid())) }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command.stdin(Stdio::null()).current_dir("/");
        command
    }

    fn own(&self, path: &Path) {
        if let Some((uid, gid)) = self.user {
            chown(path, Some(uid), Some(gid)).unwrap();
        }
    }
}

/// The test run's major version.
pub(crate) fn major_version() -> i64 {
    ask(&server("TEST_POSTGRES_URL"), "SELECT current_setting('server_version_num')::int / 10000 || ''")
        .unwrap()
        .parse()
        .unwrap()
}

/// One text value.
fn ask(url: &str, sql: &str) -> Result<String, sqlx::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connection = PgConnection::connect(url).await?;
        let row = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).fetch_optional(&mut connection).await?;
        row.map_or(Ok(String::new()), |row| row.try_get_unchecked(0).or(Ok(String::new())))
    })
}

pub(crate) struct Server {
    data: PathBuf,
    log: PathBuf,
    pub(crate) port: u16,
    child: Option<Child>,
}

impl Server {
    fn new(dir: &Path, name: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { data: dir.join(name), log: dir.join(format!("{name}.log")), port, child: None }
    }

    /// Connection string of the superuser.
    fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    pub(crate) fn ask(&self, sql: &str) -> Result<String, sqlx::Error> {
        ask(&self.url(), sql)
    }

    /// Makes its files; it does not run yet.
    fn make(installation: &Installation, dir: &Path, name: &str) -> Self {
        let server = Self::new(dir, name);
        let mut initdb = installation.command("initdb");
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "-D",
        ]);
        let made = initdb.arg(&server.data).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.configure(&[
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("wal_level", "logical"),
            ("fsync", "off"),
        ]);
        server
    }

    fn configure(&self, settings: &[Setting<'_>]) {
        let mut file = fs::File::options().append(true).open(self.data.join("postgresql.conf")).unwrap();
        for (name, value) in settings {
            writeln!(file, "{name} = '{value}'").unwrap();
        }
        writeln!(file, "port = {}", self.port).unwrap();
    }

    /// Changes settings while it runs.
    pub(crate) fn set(&self, settings: &[Setting<'_>]) {
        for (name, value) in settings {
            self.ask(&format!("ALTER SYSTEM SET {name} = '{value}'")).unwrap();
        }
        self.ask("SELECT pg_reload_conf()").unwrap();
    }

    fn start(&mut self, installation: &Installation) {
        let log = fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let mut postgres = installation.command("postgres");
        postgres.arg("-D").arg(&self.data).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(postgres.spawn().unwrap());
        eventually("Postgres is ready", || self.ask("SELECT 'yes'").ok());
    }

    fn signal(&mut self, signal: Signal) {
        if let Some(mut child) = self.child.take() {
            kill_process(Pid::from_child(&child), signal).unwrap();
            child.wait().unwrap();
        }
    }

    /// A fast shutdown.
    fn stop(&mut self) {
        self.signal(Signal::INT);
    }

    /// kill -9. Its processes take a moment to notice.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
    }

    /// Makes a standby the primary.
    pub(crate) fn promote(&self) {
        assert_eq!(self.ask("SELECT pg_promote()::text").unwrap(), "true");
        self.ask("CHECKPOINT").unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) struct Pair {
    pub(crate) primary: Server,
    pub(crate) standby: Server,
    pub(crate) database: Database,
    pub(crate) topic: Topic,
    dir: PathBuf,
}

impl Pair {
    /// Both run, and the standby has the physical slot `standby1` if its settings name it.
    pub(crate) fn start(primary_settings: &[Setting<'_>], standby_settings: &[Setting<'_>]) -> Self {
        let (installation, dir) = (Installation::find(), folder("pair"));
        installation.own(&dir);
        let mut primary = Server::make(&installation, &dir, "primary");
        let mut standby = Server::new(&dir, "standby");
        // The first start is over before the copy.
        primary.start(&installation);
        primary.stop();
        let copied = Command::new("cp").arg("-a").arg(&primary.data).arg(&standby.data).status().unwrap();
        assert!(copied.success());
        primary.configure(primary_settings);
        primary.start(&installation);
        primary.ask("SELECT pg_create_physical_replication_slot('standby1')").unwrap();
        let signal = standby.data.join("standby.signal");
        fs::write(&signal, "").unwrap();
        installation.own(&signal);
        let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", primary.port);
        standby.configure(&[("primary_conninfo", &conninfo)]);
        standby.configure(standby_settings);
        standby.start(&installation);
        let servers = Servers { postgres: primary.url(), ..Servers::shared() };
        let (database, topic) = (Database::on(&servers), Topic::new(1, &[]));
        let mut pair = Self { primary, standby, database, topic, dir };
        // A host that does not know the role yet would end the search for the primary, as a wrong password does.
        pair.catch_up();
        pair
    }

    /// A connection string with both, the standby first.
    pub(crate) fn url(&self) -> String {
        let name = &self.database.name;
        let (first, second) = (self.standby.port, self.primary.port);
        format!(
            "postgres://{name}:{name}@127.0.0.1:{first},127.0.0.1:{second}/{name}?target_session_attrs=read-write"
        )
    }

    /// Runs a command of the relay with both servers.
    pub(crate) fn run(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
        let mut command = command(&self.database);
        command.args(arguments).env("CDC_RELAY_POSTGRES__URL", self.url()).envs(environment.iter().copied());
        command.output().unwrap()
    }

    /// `cdc-relay init`, with a slot that is synchronised.
    pub(crate) fn init(&self) {
        let output = self.run(&["init"], &[("CDC_RELAY_POSTGRES__FAILOVER", "true")]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Whether the standby would keep the slot.
    pub(crate) fn is_synced(&self) -> bool {
        let sql = "SELECT count(*)::text FROM pg_replication_slots WHERE synced AND NOT temporary";
        self.standby.ask(sql).is_ok_and(|n| n == "1")
    }

    /// Copies the slot to the standby as it is now.
    pub(crate) fn sync(&self) {
        eventually("the slot is synchronised", || {
            // So that the primary has a point that the standby can begin at, too.
            self.primary.ask("SELECT pg_log_standby_snapshot()").unwrap();
            self.standby.ask("SELECT pg_sync_replication_slots()").ok().filter(|_| self.is_synced())
        });
    }

    /// Waits until the standby has everything.
    pub(crate) fn catch_up(&mut self) {
        let lsn = self.database.current_lsn();
        let sql = format!("SELECT (pg_last_wal_replay_lsn() >= '{lsn}')::text");
        eventually("the standby has caught up", || self.standby.ask(&sql).ok().filter(|yes| yes == "true"));
    }

    /// Cuts the standby off, so that the primary runs ahead of it.
    pub(crate) fn cut(&self) {
        self.standby.set(&[("primary_conninfo", "")]);
        let sql = "SELECT count(*)::text FROM pg_stat_wal_receiver";
        eventually("the standby is cut off", || self.standby.ask(sql).ok().filter(|n| n == "0"));
    }

    /// The primary is killed, and the standby takes its place.
    pub(crate) fn fail_over(&mut self) {
        self.primary.kill();
        self.standby.promote();
        self.database.move_to(self.standby.port);
    }
}

impl Pair {
    /// The primary that was killed is started again, as nobody should.
    pub(crate) fn come_back(&mut self) {
        self.primary.start(&Installation::find());
        self.database.move_to(self.primary.port);
    }
}

/// A server of a test's own, whose settings are in its files, so that SQL can change them.
pub(crate) struct Alone {
    pub(crate) server: Server,
    installation: Installation,
    dir: PathBuf,
}

impl Alone {
    pub(crate) fn start(settings: &[Setting<'_>]) -> Self {
        let (installation, dir) = (Installation::find(), folder("alone"));
        installation.own(&dir);
        let mut server = Server::make(&installation, &dir, "server");
        server.configure(settings);
        server.start(&installation);
        Self { server, installation, dir }
    }

    /// A database on it.
    pub(crate) fn database(&self) -> Database {
        Database::on(&Servers { postgres: self.server.url(), ..Servers::shared() })
    }

    pub(crate) fn restart(&mut self) {
        self.server.stop();
        self.server.start(&self.installation);
    }

    /// Copies a file to where the server may read it.
    pub(crate) fn give(&self, file: &Path) -> PathBuf {
        let path = self.server.data.join(file.file_name().unwrap());
        fs::copy(file, &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self.installation.own(&path);
        path
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.server.kill();
        if std::thread::panicking() {
            eprintln!("the server's log is in {}", self.dir.display());
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.primary.kill();
        self.standby.kill();
        if std::thread::panicking() {
            eprintln!("the servers' logs are in {}", self.dir.display());
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
