//! Where Postgres is: connection URLs as libpq takes them
//! (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS>).

use std::{fmt, path::PathBuf};

use service::Secret;

/// A parsed `postgres://user:password@host:port/database?parameters`.
#[derive(Debug, Clone)]
pub(crate) struct ConnInfo {
    /// Tried in this order.
    pub(crate) hosts: Vec<Host>,
    pub(crate) user: String,
    pub(crate) password: Secret,
    pub(crate) database: String,
    pub(crate) ssl_mode: SslMode,
    /// A file in PEM form, or `system`; without one the system's certificates are used where one is needed.
    pub(crate) ssl_root_cert: Option<PathBuf>,
    /// The client's certificate and key, in PEM form.
    pub(crate) ssl_cert: Option<PathBuf>,
    pub(crate) ssl_key: Option<PathBuf>,
    /// Which of the hosts will do.
    pub(crate) target: Target,
}

/// What libpq means by `target_session_attrs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The first that takes us.
    Any,
    /// One whose transactions may write: not a standby, and `default_transaction_read_only` is off.
    ReadWrite,
    /// One that is not in recovery.
    Primary,
}

/// One place to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Host {
    Tcp { name: String, port: u16 },
    Unix(PathBuf),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { name, port } => write!(f, "{name}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What libpq means by `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) enum SslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl ConnInfo {
    /// Parses a URL. A password given apart wins over the URL's. The error never repeats the URL, which may
    /// hold a password.
    pub(crate) fn parse(url: &str, password: &Secret) -> Result<Self, String> {
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let rest = rest.ok_or("must begin with postgres:// or postgresql://")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let (userinfo, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, url_password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
        let user = decode(user)?;
        if user.is_empty() {
            return Err("must name a user: postgres://USER@HOST:PORT/DATABASE".into());
        }
        let database = decode(database)?;
        let mut info = Self {
            hosts: Vec::new(),
            database: if database.is_empty() { user.clone() } else { database },
            user,
            password: if password.is_empty() { Secret::new(decode(url_password)?) } else { password.clone() },
            ssl_mode: SslMode::Prefer,
            ssl_root_cert: None,
            ssl_cert: None,
            ssl_key: None,
            target: Target::Any,
        };
        let (mut query_host, mut query_port) = (None, None);
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| format!("parameter {pair:?} has no value"))?;
            let value = decode(value)?;
            match key {
                "host" => query_host = Some(value),
                "port" => query_port = Some(value),
                _ => info.set(key, &value)?,
            }
        }
        let (mut names, mut ports) = (Vec::new(), Vec::new());
        for host in hosts.split(',') {
            let (name, port) = split_host(host);
            names.push(decode(name)?);
            ports.push(decode(port)?);
        }
        // As libpq has it, a parameter replaces what stands before the path, hosts and ports each on their own.
        if let Some(hosts) = query_host {
            if query_port.is_none() && ports.iter().all(String::is_empty) {
                ports = vec![String::new()];
            }
            names = hosts.split(',').map(str::to_owned).collect();
        }
        if let Some(list) = query_port {
            ports = list.split(',').map(str::to_owned).collect();
        }
        info.hosts = match_ports(&names, &ports)?;
        Ok(info)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "sslmode" => self.ssl_mode = parse_ssl_mode(value)?,
            "sslrootcert" => self.ssl_root_cert = Some(value.into()),
            "sslcert" => self.ssl_cert = Some(value.into()),
            "sslkey" => self.ssl_key = Some(value.into()),
            "target_session_attrs" => {
                self.target = match value {
                    "any" => Target::Any,
                    "read-write" => Target::ReadWrite,
                    "primary" => Target::Primary,
                    "read-only" | "standby" | "prefer-standby" => {
                        return Err(format!(
                            "target_session_attrs={value} is not supported: a slot is read on the primary (read-write, primary or any)"
                        ));
                    }
                    other => {
                        return Err(format!(
                            "target_session_attrs={other} is not any, read-write or primary"
                        ));
                    }
                }
            }
            other => return Err(format!("parameter {other:?} is not known here")),
        }
        Ok(())
    }
}

const DEFAULT_PORT: u16 = 5432;

fn parse_ssl_mode(value: &str) -> Result<SslMode, String> {
    Ok(match value {
        "disable" => SslMode::Disable,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        other => {
            return Err(format!("sslmode={other} is not disable, prefer, require, verify-ca or verify-full"));
        }
    })
}

fn parse_port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|p| *p != 0).ok_or_else(|| format!("port {text:?} is not 1 to 65535"))
}

/// Name and port of `[::1]:5432`, `name:5432`, `name`, or nothing.
fn split_host(text: &str) -> (&str, &str) {
    match text.strip_prefix('[').and_then(|t| t.split_once(']')) {
        Some((address, rest)) => (address, rest.strip_prefix(':').unwrap_or_default()),
        None => text.rsplit_once(':').unwrap_or((text, "")),
    }
}

/// Gives each host its port: one for all, or one each; an empty one is the default.
fn match_ports(names: &[String], ports: &[String]) -> Result<Vec<Host>, String> {
    if ports.len() != 1 && ports.len() != names.len() {
        return Err(format!(
            "has {} ports for {} hosts: give one for all, or one each",
            ports.len(),
            names.len()
        ));
    }
    let host = |(i, name): (usize, &String)| {
        let port = ports.get(i).or(ports.first()).filter(|port| !port.is_empty());
        Ok(named_host(name, port.map_or(Ok(DEFAULT_PORT), |port| parse_port(port))?))
    };
    names.iter().enumerate().map(host).collect()
}

fn named_host(name: &str, port: u16) -> Host {
    match name {
        "" => Host::Tcp { name: "localhost".into(), port },
        path if path.starts_with('/') => Host::Unix(format!("{path}/.s.PGSQL.{port}").into()),
        name => Host::Tcp { name: name.into(), port },
    }
}

/// Undoes percent encoding.
fn decode(text: &str) -> Result<String, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
            let (high, low) = (digit(bytes.next()), digit(bytes.next()));
            let value = high.zip(low).and_then(|(h, l)| u8::try_from(h * 16 + l).ok());
            out.push(
                value.ok_or(
                    "has a % that two hexadecimal digits do not follow; write %25 for a percent sign",
                )?,
            );
        } else {
            out.push(byte);
        }
    }
    match String::from_utf8(out) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err("is not UTF-8 without NUL once its percent signs are undone".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<ConnInfo, String> {
        ConnInfo::parse(url, &Secret::default())
    }

    fn tcp(name: &str, port: u16) -> Host {
        Host::Tcp { name: name.into(), port }
    }

    #[test]
    fn urls_mean_what_libpq_means_by_them() {
        let info = parse(
            "postgres://u%40x:p%3Aw@h1:1,[::1]:2,h3/db?sslmode=verify-full&target_session_attrs=read-write",
        )
        .unwrap();
        assert_eq!(
            (info.user.as_str(), info.password.expose(), info.database.as_str()),
            ("u@x", "p:w", "db")
        );
        assert_eq!(info.hosts, [tcp("h1", 1), tcp("::1", 2), tcp("h3", 5432)]);
        assert!(info.target == Target::ReadWrite && info.ssl_mode == SslMode::VerifyFull);
        let info = parse("postgresql://me@/?host=/run/pg&port=77").unwrap();
        assert_eq!(info.database, "me");
        assert_eq!(info.hosts, [Host::Unix("/run/pg/.s.PGSQL.77".into())]);
        assert_eq!(
            parse("postgres://me@%2Frun%2Fpg/db").unwrap().hosts,
            [Host::Unix("/run/pg/.s.PGSQL.5432".into())]
        );
    }

    #[test]
    fn several_hosts_share_a_port_or_have_one_each() {
        let hosts = |url: &str| parse(url).map(|info| info.hosts);
        let (a, b) = (|port| tcp("a", port), |port| tcp("b", port));
        assert_eq!(hosts("postgres://u@a,b/d").unwrap(), [a(5432), b(5432)]);
        assert_eq!(hosts("postgres://u@a:1,b/d").unwrap(), [a(1), b(5432)]);
        assert_eq!(hosts("postgres://u@/d?host=a,b").unwrap(), [a(5432), b(5432)]);
        assert_eq!(hosts("postgres://u@/d?host=a,b&port=7").unwrap(), [a(7), b(7)]);
        assert_eq!(hosts("postgres://u@/d?host=a,b&port=1,2").unwrap(), [a(1), b(2)]);
        assert_eq!(hosts("postgres://u@/d?port=1,&host=a,b").unwrap(), [a(1), b(5432)]);
        assert_eq!(hosts("postgres://u@a:1,b:2/d?port=3").unwrap(), [a(3), b(3)]);
        assert_eq!(hosts("postgres://u@/d?host=/run/pg,b&port=1,2").unwrap()[1], b(2));
        for (bad, said) in [
            ("postgres://u@/d?host=a,b,c&port=1,2", "2 ports for 3 hosts"),
            ("postgres://u@a:1,b:2/d?host=c", "2 ports for 1 hosts"),
            ("postgres://u@/d?host=a&port=x", "\"x\""),
            ("postgres://u@a,b/d?target_session_attrs=standby", "is read on the primary"),
            ("postgres://u@a,b/d?target_session_attrs=master", "is not any"),
            ("postgres://u@a,b/d?load_balance_hosts=random", "not known"),
        ] {
            let error = hosts(bad).unwrap_err();
            assert!(error.contains(said), "{bad}: {error}");
        }
    }

    #[test]
    fn a_password_given_apart_wins_and_no_error_repeats_one() {
        let info = ConnInfo::parse("postgres://u:old@h/db", &Secret::new("new")).unwrap();
        assert_eq!(info.password.expose(), "new");
        assert!(!format!("{info:?}").contains("new"));
        for bad in [
            "http://u:hunter2@h",
            "postgres://:hunter2@h",
            "postgres://u:hunter2%@h",
            "postgres://u:hunter2@h:0/db",
            "postgres://u:hunter2@h/d?sslmode=maybe",
            "postgres://u:hunter2@h/d?x=1",
        ] {
            let error = parse(bad).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
