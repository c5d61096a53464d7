//! Postgres: which one, its cluster, and the two databases in it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::{
    cli, ending,
    endpoints::database,
    failure::{Explain, Failure, Result},
    identity,
    layout::Layout,
    maven, ports,
    prerequisites::on_path,
    progress::Progress,
    spec::{Layer, Probe, Spec, open_log},
};

/// The oldest version that the relay supports.
const MAJOR_AT_LEAST: u32 = 15;

/// How long the processes of a postmaster that was killed may take to notice.
const ORPHANS_LIMIT: Duration = Duration::from_secs(5);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Enough for a test suite that makes a slot for each of its tests.
const SLOTS_MAX: u32 = 64;

/// An installation of Postgres.
#[derive(Debug, Clone)]
pub(crate) struct Installation {
    /// The folder with `postgres` and `initdb`.
    pub bin: PathBuf,
    pub major: u32,
    /// As in "18.6".
    pub version: String,
}

/// The installation to use, fetched if need be.
pub(crate) fn install(layout: &Layout, progress: &Progress, which: cli::Postgres) -> Result<Installation> {
    let major = match which {
        cli::Postgres::System => return system(),
        cli::Postgres::V15 => 15,
        cli::Postgres::V16 => 16,
        cli::Postgres::V17 => 17,
        cli::Postgres::V18 => 18,
    };
    let bin = maven::postgres(layout, progress, major)?.join("bin");
    let (major, version) = version(&bin)?;
    Ok(Installation { bin, major, version })
}

/// The newest installed one: on the PATH, in Debian's folders, or where `pg_config` says.
fn system() -> Result<Installation> {
    let mut folders: Vec<PathBuf> =
        on_path("postgres").iter().filter_map(|file| Some(file.parent()?.to_path_buf())).collect();
    let debian =
        fs::read_dir("/usr/lib/postgresql").into_iter().flatten().filter_map(std::result::Result::ok);
    folders.extend(debian.map(|entry| entry.path().join("bin")));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let found = folders
        .into_iter()
        .filter(|bin| bin.join("initdb").is_file())
        .filter_map(|bin| version(&bin).ok().map(|(major, version)| Installation { bin, major, version }))
        .max_by_key(|installation| installation.major);
    let install = "install one (on Debian or Ubuntu: apt-get install postgresql), or leave --postgres out";
    match found {
        Some(installation) if installation.major >= MAJOR_AT_LEAST => Ok(installation),
        Some(old) => {
            Err(Failure::new(format!("the installed Postgres is {}; 15 or later is needed", old.version))
                .hint(install))
        }
        None => Err(Failure::new(
            "no installed Postgres server found on the PATH, in /usr/lib/postgresql/*/bin or by pg_config",
        )
        .hint(install)),
    }
}

fn version(bin: &Path) -> Result<(u32, String)> {
    let program = bin.join("postgres");
    let output =
        Command::new(&program).arg("--version").output().explain(|| format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).ok_or_else(|| {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Failure::new(format!("{} --version says {text:?} {errors:?}", program.display()))
    })
}

/// `postgres (PostgreSQL) 15.18 (Debian …)`.
fn parse_version(text: &str) -> Option<(u32, String)> {
    let version = text.split_once("(PostgreSQL) ")?.1.split_ascii_whitespace().next()?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((digits.parse().ok()?, version.to_owned()))
}

/// The folder of the cluster: one per major version, since they cannot read each other's.
pub(crate) fn cluster(layout: &Layout, major: u32) -> PathBuf {
    layout.data().join(format!("postgres-{major}"))
}

/// Makes the cluster if there is none, and writes its settings.
pub(crate) fn prepare(
    layout: &Layout,
    installation: &Installation,
    port: u16,
    settings: &[(String, String)],
) -> Result<()> {
    let cluster = cluster(layout, installation.major);
    if !cluster.is_dir() {
        init(layout, installation, &cluster)?;
    }
    let sockets = sockets(layout);
    own(layout, &sockets, 0o755)?;
    let conf = cluster.join("stack.conf");
    fs::write(&conf, stack_conf(port, &sockets, settings)).explain(|| format!("write {}", conf.display()))
}

/// Into a folder beside it first: an `initdb` that was interrupted leaves nothing that looks like a cluster.
fn init(layout: &Layout, installation: &Installation, cluster: &Path) -> Result<()> {
    let new = cluster.with_extension("new");
    if new.exists() {
        fs::remove_dir_all(&new).explain(|| format!("remove {}", new.display()))?;
    }
    own(layout, &new, 0o700)?;
    let password = layout.conf().join("superuser-password");
    fs::write(&password, "postgres\n").explain(|| format!("write {}", password.display()))?;
    let log_path = layout.log("postgres");
    let log = open_log(&log_path)?;
    let errors = log.try_clone().explain(|| format!("write {}", log_path.display()))?;
    let mut initdb = Command::new(installation.bin.join("initdb"));
    initdb.arg("--pgdata").arg(&new).arg("--pwfile").arg(&password);
    initdb.args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
    initdb.stdin(Stdio::null()).stdout(log).stderr(errors).current_dir(&new);
    if let Some(user) = layout.user {
        std::os::unix::process::CommandExt::uid(&mut initdb, user.uid);
        std::os::unix::process::CommandExt::gid(&mut initdb, user.gid);
    }
    let status = initdb.status().explain(|| "start initdb".to_owned())?;
    if !status.success() {
        let why = format!("initdb failed: {}", ending::describe(status));
        return Err(crate::logs::with_tail(Failure::new(why), &log_path));
    }
    let main = new.join("postgresql.conf");
    let mut text = fs::read_to_string(&main).explain(|| format!("read {}", main.display()))?;
    text.push_str(
        "\n# The local stack's settings, written at every start. ALTER SYSTEM has the last word.\n",
    );
    text.push_str("include 'stack.conf'\n");
    fs::write(&main, text).explain(|| format!("write {}", main.display()))?;
    fs::rename(&new, cluster).explain(|| format!("move the cluster to {}", cluster.display()))
}

/// A folder that belongs to the user that Postgres runs as.
fn own(layout: &Layout, folder: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(folder).explain(|| format!("create {}", folder.display()))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
        .explain(|| format!("set the mode of {}", folder.display()))?;
    match layout.user {
        Some(user) => chown(folder, Some(user.uid), Some(user.gid))
            .explain(|| format!("give {} to the user that Postgres runs as", folder.display())),
        None => Ok(()),
    }
}

fn stack_conf(port: u16, sockets: &Path, settings: &[(String, String)]) -> String {
    let own = [
        ("listen_addresses", "127.0.0.1".to_owned()),
        ("port", port.to_string()),
        ("unix_socket_directories", sockets.display().to_string()),
        ("wal_level", "logical".to_owned()),
        ("max_replication_slots", SLOTS_MAX.to_string()),
        ("max_wal_senders", SLOTS_MAX.to_string()),
        ("max_connections", "200".to_owned()),
        ("log_line_prefix", "%m [%p] %q%u@%d ".to_owned()),
        ("timezone", "UTC".to_owned()),
        ("log_timezone", "UTC".to_owned()),
    ];
    let given = settings.iter().map(|(name, value)| (name.as_str(), value.clone()));
    let quoted = |value: String| value.replace('\\', "\\\\").replace('\'', "''");
    let lines = own.into_iter().chain(given).map(|(name, value)| format!("{name} = '{}'", quoted(value)));
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

/// The folder of the Unix socket.
pub(crate) fn sockets(layout: &Layout) -> PathBuf {
    layout.run.join("pg")
}

/// How to run it.
pub(crate) fn spec(layout: &Layout, installation: &Installation, port: u16) -> Spec {
    let cluster = cluster(layout, installation.major);
    Spec {
        name: "postgres".to_owned(),
        service: "postgres".to_owned(),
        layer: Layer::Postgres,
        program: installation.bin.join("postgres"),
        args: vec!["-D".into(), cluster.clone().into()],
        env: Vec::new(),
        cwd: cluster,
        user: layout.user,
        log: layout.log("postgres"),
        port,
        probe: Probe::Postgres { url: database(port, "postgres", "postgres") },
        grace: Duration::from_secs(30),
    }
}

/// Makes the two databases if they are missing and applies `postgres/*.sql`. As the superuser.
pub(crate) async fn databases(layout: &Layout, port: u16) -> Result<()> {
    let mut maintenance = connect(port, "postgres").await?;
    ensure(&mut maintenance, "orders", None).await?;
    let mut orders = connect(port, "orders").await?;
    for file in ["init.sql", "local.sql"] {
        apply(layout, &mut orders, file).await?;
    }
    ensure(&mut maintenance, "consumers", Some("consumer")).await?;
    let mut consumers = connect(port, "consumers").await?;
    apply(layout, &mut consumers, "consumers.sql").await?;
    for connection in [orders, consumers, maintenance] {
        let _ = connection.close().await;
    }
    Ok(())
}

async fn apply(layout: &Layout, connection: &mut PgConnection, file: &str) -> Result<()> {
    let path = layout.root.join("postgres").join(file);
    let sql = fs::read_to_string(&path).explain(|| format!("read {}", path.display()))?;
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(connection)
        .await
        .map(drop)
        .explain(|| format!("apply postgres/{file}"))
}

async fn connect(port: u16, name: &str) -> Result<PgConnection> {
    PgConnection::connect(&database(port, "postgres", name))
        .await
        .explain(|| format!("connect to the database {name}"))
}

async fn ensure(maintenance: &mut PgConnection, name: &str, owner: Option<&str>) -> Result<()> {
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(name)
        .fetch_one(&mut *maintenance)
        .await
        .explain(|| "look for the databases".to_owned())?;
    if there {
        return Ok(());
    }
    let owner = owner.map(|owner| format!(" OWNER {owner}")).unwrap_or_default();
    sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}{owner}")))
        .execute(maintenance)
        .await
        .explain(|| format!("create the database {name}"))?;
    Ok(())
}

/// After a postmaster was killed: waits for its orphans, which hold the shared memory until they notice, and
/// removes its pid file, whose id may belong to somebody else by now. No postmaster of this cluster may run.
pub(crate) async fn clear_remains(cluster: &Path) {
    if !Path::new("/proc/self/cwd").exists() {
        return; // Postgres itself checks what it can.
    }
    let until = tokio::time::Instant::now() + ORPHANS_LIMIT;
    while !inhabitants(cluster).is_empty() {
        if tokio::time::Instant::now() > until {
            for pid in inhabitants(cluster) {
                identity::send(pid, Signal::KILL);
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let _ = fs::remove_file(cluster.join("postmaster.pid"));
}

/// The processes of a cluster: `postgres`, with the data folder as its working folder (a shell that somebody left
/// in that folder is not one).
pub(crate) fn inhabitants(cluster: &Path) -> Vec<u32> {
    let lives_here = |pid: &u32| {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == cluster);
        cwd && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "postgres")
    };
    ports::processes().into_iter().filter(lives_here).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_packages_and_of_betas() {
        let debian = "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        assert_eq!(parse_version(debian), Some((15, "15.18".to_owned())));
        assert_eq!(parse_version("postgres (PostgreSQL) 19beta1\n"), Some((19, "19beta1".to_owned())));
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn settings_are_quoted_and_the_given_ones_come_last() {
        let given = [("wal_level".to_owned(), "rep'lica".to_owned())];
        let conf = stack_conf(1234, Path::new("/tmp/o's"), &given);
        assert!(conf.contains("port = '1234'\n"));
        assert!(conf.contains("unix_socket_directories = '/tmp/o''s'\n"));
        assert!(conf.ends_with("wal_level = 'rep''lica'\n"));
        assert!(!conf.contains("fsync"), "as in production unless told otherwise");
    }
}
