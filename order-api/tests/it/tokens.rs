//! Who may ask, when the service asks for tokens.

use std::{fs, path::PathBuf};

use crate::{
    process::binary,
    stage::{Answer, Client, Service, Stage, order, wait_for},
};

/// A file of tokens, removed with the test.
pub(crate) struct TokensFile(pub(crate) PathBuf);

impl TokensFile {
    pub(crate) fn of(entries: &[&str]) -> Self {
        let name = format!("order-api-tokens-{}-{:x}.toml", std::process::id(), fastrand::u64(..));
        let file = Self(std::env::temp_dir().join(name));
        file.write(entries);
        file
    }

    fn write(&self, entries: &[&str]) {
        fs::write(&self.0, entries.concat()).unwrap();
    }
}

impl Drop for TokensFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A token as the command makes it, and its entry.
pub(crate) fn token(name: &str, scopes: &str) -> (String, String) {
    let output = binary().args(["token", "new", "--name", name, "--scopes", scopes]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    let token = told.split_whitespace().last().unwrap().to_owned();
    let entry = String::from_utf8(output.stdout).unwrap();
    assert!(token.starts_with("oat_") && !entry.contains(&token), "{entry}");
    (token, entry)
}

fn protected(stage: &Stage, file: &TokensFile) -> Service {
    stage.service_with(|config| config.auth.tokens_path.clone_from(&file.0))
}

fn ask(client: &Client, method: &str, path: &str, token: &str) -> Answer {
    let authorization = format!("Bearer {token}");
    let body = if method == "POST" { order().to_string() } else { String::new() };
    let headers = [("content-type", "application/json"), ("authorization", authorization.as_str())];
    client.send(method, path, &headers, &body)
}

#[test]
fn a_token_opens_what_it_may_and_nothing_else_does() {
    let stage = Stage::new();
    let (reader, reads) = token("reader", "read");
    let (shop, writes) = token("shop", "read,write");
    let file = TokensFile::of(&[&reads, &writes]);
    let service = protected(&stage, &file);

    let created = ask(&service, "POST", "/api/orders", &shop);
    assert_eq!(created.status, 201, "{created:?}");
    let path = created.header("location").to_owned();
    for good in [&reader, &shop] {
        assert_eq!(ask(&service, "GET", &path, good).status, 200);
        assert_eq!(ask(&service, "HEAD", &path, good).status, 200);
    }
    let refused = ask(&service, "POST", "/api/orders", &reader);
    let problem = refused.problem(403, "insufficient-scope");
    assert!(problem["detail"].as_str().unwrap().contains("write"), "{problem}");
    assert!(refused.header("www-authenticate").contains("scope=\"write\""), "{refused:?}");

    for (method, path) in [("POST", "/api/orders"), ("GET", path.as_str()), ("GET", "/api/orders/none")] {
        let none = service.send(method, path, &[("content-type", "application/json")], "");
        none.problem(401, "token-missing");
        assert_eq!(none.header("www-authenticate"), "Bearer realm=\"order-api\"");
        for wrong in ["oat_0", &shop[..shop.len() - 1], ""] {
            let wrong = ask(&service, method, path, wrong);
            wrong.problem(401, "token-invalid");
            assert!(wrong.header("www-authenticate").contains("invalid_token"), "{wrong:?}");
        }
    }
    for open in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(service.get(open).status, 200, "{open}");
    }
    assert_eq!(stage.count("orders"), 1);
}

#[test]
fn a_change_of_the_file_counts_without_a_restart_and_a_broken_file_changes_nothing() {
    let stage = Stage::new();
    let ((old, first), (new, second)) = (token("shop", "read"), token("shop", "read"));
    let file = TokensFile::of(&[&first]);
    let service = protected(&stage, &file);
    let status = |token: &str| ask(&service, "GET", "/api/orders/none", token).status;
    assert_eq!((status(&old), status(&new)), (404, 401));
    file.write(&[&first, &second]);
    wait_for("the second token to open", || status(&new) == 404);
    assert_eq!(status(&old), 404, "both, so that a client can change");
    // Broken, then gone; what comes after that is taken again, so both have been looked at.
    file.write(&[&second, "[[token]]\nname = 7\n"]);
    fs::remove_file(&file.0).unwrap();
    assert_eq!((status(&old), status(&new)), (404, 404));
    file.write(&[&second]);
    wait_for("the first token to be revoked", || status(&old) == 401);
    assert_eq!(status(&new), 404);
}
