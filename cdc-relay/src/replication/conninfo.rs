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
    /// Only a server that takes writes will do.
    pub(crate) read_write: bool,
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
            read_write: false,
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
        match query_host {
            Some(host) => {
                let port = query_port.as_deref().map_or(Ok(DEFAULT_PORT), parse_port)?;
                info.hosts = host.split(',').map(|h| named_host(h, port)).collect();
            }
            None => info.hosts = hosts.split(',').map(parse_host).collect::<Result<_, _>>()?,
        }
        Ok(info)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "sslmode" => self.ssl_mode = parse_ssl_mode(value)?,
            "sslrootcert" => self.ssl_root_cert = Some(value.into()),
            "sslcert" => self.ssl_cert = Some(value.into()),
            "sslkey" => self.ssl_key = Some(value.into()),
            "target_session_attrs" => {
                self.read_write = match value {
                    "any" => false,
                    "read-write" | "primary" => true,
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

fn parse_host(text: &str) -> Result<Host, String> {
    // [::1]:5432, name:5432, name, or nothing.
    let (name, port) = match text.strip_prefix('[').and_then(|t| t.split_once(']')) {
        Some((address, rest)) => (address, rest.strip_prefix(':')),
        None => text.rsplit_once(':').map_or((text, None), |(n, p)| (n, Some(p))),
    };
    let port = port.map_or(Ok(DEFAULT_PORT), parse_port)?;
    Ok(named_host(&decode(name)?, port))
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
        assert!(info.read_write && info.ssl_mode == SslMode::VerifyFull);
        let info = parse("postgresql://me@/?host=/run/pg&port=77").unwrap();
        assert_eq!(info.database, "me");
        assert_eq!(info.hosts, [Host::Unix("/run/pg/.s.PGSQL.77".into())]);
        assert_eq!(
            parse("postgres://me@%2Frun%2Fpg/db").unwrap().hosts,
            [Host::Unix("/run/pg/.s.PGSQL.5432".into())]
        );
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
