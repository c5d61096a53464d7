//! Configuration: defaults, then one TOML file, then environment variables, then flags.
//!
//! Every key lives in a section, so every variable has a double underscore: `CDC_RELAY_POSTGRES__URL` is
//! `url` of `[postgres]`. Variables of our prefix without one are ignored, because Kubernetes puts some there
//! (`CDC_RELAY_SERVICE_HOST`). A variable whose name ends in `_FILE` names a file that holds the value.
//! Below a section's free-form table (`[kafka.properties]`) an underscore stands for a dot:
//! `CDC_RELAY_KAFKA__PROPERTIES__SASL_USERNAME` is `sasl.username`.

use std::{fmt, path::Path};

use config::{Config, File, FileFormat};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use toml::{Table, Value};

use crate::Failure;

/// A value that is never printed: not by `Debug`, not by `Display`, not when serialised.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value so that it cannot be printed by accident.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that has to send it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// The `[http]` section every service has.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// `address:port` to listen on; port 0 takes a free one.
    pub listen: String,
}

/// Loads a service's configuration. `prefix` is that of its environment variables, without the trailing
/// underscore; `flags` are `(section.key, value)` from the command line and win over everything.
///
/// # Errors
/// 64 with the key and where it came from: a file that cannot be read, an unknown key, a value of the wrong
/// type, a variable that is set both directly and by `_FILE`.
pub fn load<T: DeserializeOwned>(
    prefix: &str,
    file: Option<&Path>,
    flags: &[(&str, String)],
) -> Result<T, Failure> {
    load_from(
        prefix,
        file,
        flags,
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
    )
}

/// Reads a list, which an environment variable or a flag gives as a text with commas: for `deserialize_with`.
///
/// # Errors
/// It is neither.
pub fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        List(Vec<String>),
        Text(String),
    }
    Ok(match Written::deserialize(deserializer)? {
        Written::List(list) => list,
        Written::Text(text) => {
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
        }
    })
}

fn load_from<T: DeserializeOwned>(
    prefix: &str,
    file: Option<&Path>,
    flags: &[(&str, String)],
    vars: impl Iterator<Item = (String, String)>,
) -> Result<T, Failure> {
    let mut builder = Config::builder();
    if let Some(path) = file {
        // Read here rather than by the library, which would also try other endings of the name.
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::configuration(format!("cannot read the configuration file {}: {e}", path.display()))
        })?;
        toml::from_str::<Table>(&text)
            .map_err(|e| Failure::configuration(format!("{} is not valid TOML: {e}", path.display())))?;
        builder = builder.add_source(File::from_str(&text, FileFormat::Toml));
    }
    let mut overlay = from_environment(prefix, vars)?;
    for (key, value) in flags {
        let path: Vec<&str> = key.split('.').collect();
        insert(&mut overlay, &path, value.clone());
    }
    builder = builder.add_source(File::from_str(&overlay.to_string(), FileFormat::Toml));
    let loaded = builder.build().and_then(Config::try_deserialize);
    loaded.map_err(|e| {
        let origin = file
            .map_or_else(|| "the environment".to_owned(), |f| format!("{} or the environment", f.display()));
        Failure::configuration(format!("bad configuration: {e}"))
            .hint(format!("look in {origin} ({prefix}_SECTION__KEY); `config example` prints every key"))
    })
}

fn from_environment(prefix: &str, vars: impl Iterator<Item = (String, String)>) -> Result<Table, Failure> {
    let mut overlay = Table::new();
    let mut seen: Vec<(String, String)> = Vec::new();
    for (name, value) in vars {
        let Some(rest) = name.strip_prefix(prefix).and_then(|r| r.strip_prefix('_')) else { continue };
        if !rest.contains("__") {
            if rest != "CONFIG" && !is_from_kubernetes(rest) {
                eprintln!(
                    "warning: {name} is not read: a key's variable is {prefix}_SECTION__KEY, with two underscores"
                );
            }
            continue;
        }
        let (key, value) = match rest.strip_suffix("_FILE") {
            Some(key) => {
                let text = std::fs::read_to_string(&value).map_err(|e| {
                    Failure::configuration(format!("{name} names {value}, which cannot be read: {e}"))
                })?;
                (key, text.trim_end_matches(['\r', '\n']).to_owned())
            }
            None => (rest, value),
        };
        let key = key.to_ascii_lowercase();
        if let Some((_, other)) = seen.iter().find(|(k, _)| *k == key) {
            return Err(Failure::configuration(format!(
                "{name} and {other} both set the same key; keep one"
            )));
        }
        let mut path: Vec<String> = key.split("__").map(str::to_owned).collect();
        if let Some(free_form) = path.get_mut(2) {
            *free_form = free_form.replace('_', ".");
        }
        insert(&mut overlay, &path.iter().map(String::as_str).collect::<Vec<_>>(), value);
        seen.push((key, name));
    }
    Ok(overlay)
}

/// Whether the rest of a variable's name is of those that Kubernetes sets for a service that is named like ours.
fn is_from_kubernetes(rest: &str) -> bool {
    rest == "PORT" || rest == "SERVICE_HOST" || rest.starts_with("SERVICE_PORT") || rest.starts_with("PORT_")
}

fn insert(table: &mut Table, path: &[&str], value: String) {
    match path {
        [] => {}
        [key] => {
            table.insert((*key).to_owned(), Value::String(value));
        }
        [section, rest @ ..] => {
            let entry = table.entry(*section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = entry {
                insert(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Example {
        postgres: Postgres,
        kafka: Kafka,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Postgres {
        url: String,
        password: Secret,
        port: u16,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Kafka {
        properties: BTreeMap<String, String>,
    }

    fn load(
        file: Option<&Path>,
        flags: &[(&str, String)],
        vars: &[(&str, &str)],
    ) -> Result<Example, Failure> {
        load_from("X", file, flags, vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
    }

    fn file(name: &str, text: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("service-config-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn the_environment_wins_over_the_file_and_flags_over_both() {
        let path =
            file("a.toml", "[postgres]\nurl = 'file'\nport = 1\n[kafka.properties]\n'linger.ms' = 5\n");
        let c = load(
            Some(&path),
            &[("postgres.port", "3".into())],
            &[
                ("X_POSTGRES__URL", "env"),
                ("X_POSTGRES__PORT", "2"),
                ("X_KAFKA__PROPERTIES__SASL_USERNAME", "u"),
            ],
        )
        .unwrap();
        assert_eq!((c.postgres.url.as_str(), c.postgres.port), ("env", 3));
        assert_eq!(c.kafka.properties["linger.ms"], "5");
        assert_eq!(c.kafka.properties["sasl.username"], "u");
    }

    #[test]
    fn a_password_of_digits_stays_text() {
        let c = load(None, &[], &[("X_POSTGRES__PASSWORD", "0123")]).unwrap();
        assert_eq!(c.postgres.password.expose(), "0123");
        assert_eq!(format!("{:?}", c.postgres.password), "***");
    }

    #[test]
    fn a_secret_comes_from_a_file_without_its_last_newline() {
        let path = file("secret", "s3cret\n");
        let c = load(None, &[], &[("X_POSTGRES__PASSWORD_FILE", path.to_str().unwrap())]).unwrap();
        assert_eq!(c.postgres.password.expose(), "s3cret");
        let twice = load(
            None,
            &[],
            &[("X_POSTGRES__PASSWORD_FILE", path.to_str().unwrap()), ("X_POSTGRES__PASSWORD", "x")],
        );
        assert!(twice.unwrap_err().message.contains("both set"));
    }

    #[test]
    fn an_unknown_key_is_named_and_kubernetes_variables_are_not_ours() {
        let e = load(None, &[], &[("X_POSTGRES__URI", "x")]).unwrap_err();
        assert!(e.message.contains("uri"), "{e}");
        assert!(load(None, &[], &[("X_SERVICE_HOST", "10.0.0.1"), ("X_PORT_8081_TCP", "tcp://x")]).is_ok());
    }

    #[test]
    fn a_wrong_type_names_the_key() {
        let e = load(None, &[], &[("X_POSTGRES__PORT", "many")]).unwrap_err();
        assert!(e.message.contains("port"), "{e}");
        assert_eq!(e.kind.code(), 64);
    }
}
