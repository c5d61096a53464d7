//! Who asks, and what they may do: bearer tokens from a file that holds their hashes, never the tokens.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::http::{HeaderMap, Method, header};
use serde::Deserialize;
use service::Failure;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use uuid::Uuid;

use crate::error::Error;

/// How often the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// The largest file of tokens, in bytes.
const FILE_LIMIT_BYTES: u64 = 1024 * 1024;

/// The longest name of a token, in characters.
const MAX_NAME_CHARS: usize = 64;

/// What a new token begins with, so that one that strayed is recognised.
const PREFIX: &str = "oat_";

/// The client of a request: the name of its token, empty where none is asked for. Every request to a route below
/// `/api` has it among its extensions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Client(pub(crate) String);

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// GET and HEAD.
    Read,
    /// Every other method.
    Write,
}

impl Scope {
    /// What a request with this method needs.
    pub(crate) fn of(method: &Method) -> Self {
        if matches!(*method, Method::GET | Method::HEAD) { Self::Read } else { Self::Write }
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// One entry of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    /// Several may have the same, so that a client can change its token without an interruption.
    name: String,
    scopes: Vec<Scope>,
    sha256: [u8; 32],
}

/// The tokens that are good now, kept equal to the file by [`Tokens::watch`].
#[derive(Debug)]
pub(crate) struct Tokens {
    path: PathBuf,
    known: RwLock<Arc<[Token]>>,
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// 64 if it cannot be read or is not what it should be.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let known = read(path).map_err(|why| {
            Failure::configuration(format!("auth.tokens_path {}: {why}", path.display()))
                .hint("`order-api token new --name NAME --scopes read,write` prints the lines of a token")
        })?;
        Ok(Self { path: path.into(), known: RwLock::new(known.into()) })
    }

    /// Who asks, if their token allows this method.
    ///
    /// # Errors
    /// There is no token, it is not one of ours, or it does not allow the method.
    pub(crate) fn client(&self, headers: &HeaderMap, method: &Method) -> Result<Client, Error> {
        if !headers.contains_key(header::AUTHORIZATION) {
            return Err(Error::TokenMissing);
        }
        let token = bearer(headers).ok_or(Error::TokenWrong)?;
        let hash = Sha256::digest(token);
        let known = Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner));
        // Each is compared, whether or not an earlier one matched.
        let mut found = None;
        for candidate in known.iter() {
            if candidate.sha256.ct_eq(&hash).into() {
                found = Some(candidate);
            }
        }
        let found = found.ok_or(Error::TokenWrong)?;
        let needed = Scope::of(method);
        if found.scopes.contains(&needed) {
            Ok(Client(found.name.clone()))
        } else {
            Err(Error::ScopeMissing(needed.as_str()))
        }
    }

    /// Follows the file for ever. While it is broken, the former tokens stay good.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut trouble = None;
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let this = Arc::clone(&self);
            let Ok(looked) = tokio::task::spawn_blocking(move || this.look()).await else { return };
            let now = looked.err();
            if let Some(error) = &now
                && trouble != now
            {
                let file = self.path.display();
                tracing::error!(%file, error, "auth.tokens_path is broken, the former tokens stay good");
            }
            trouble = now;
        }
    }

    /// Takes what the file holds now.
    fn look(&self) -> Result<(), String> {
        let now = read(&self.path)?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if **known != *now {
            tracing::info!(file = %self.path.display(), tokens = now.len(), "the tokens have changed");
            *known = now.into();
        }
        Ok(())
    }
}

/// The token of `Authorization: Bearer TOKEN` (<https://www.rfc-editor.org/rfc/rfc6750#section-2.1>), if that is the
/// only such header; the scheme's name is not case-sensitive.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(only), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = only.as_bytes().split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn read(path: &Path) -> Result<Vec<Token>, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| format!("it cannot be opened: {e}"))?;
    file.take(FILE_LIMIT_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|e| format!("it cannot be read: {e}"))?;
    if text.len() as u64 > FILE_LIMIT_BYTES {
        return Err(format!("it has more than {FILE_LIMIT_BYTES} bytes"));
    }
    parse(&text)
}

/// The file's text as tokens.
fn parse(text: &str) -> Result<Vec<Token>, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Written {
        #[serde(default)]
        token: Vec<Entry>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Entry {
        name: String,
        scopes: Vec<Scope>,
        sha256: String,
    }
    let written: Written = toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(1, |at| text[..at.start].matches('\n').count() + 1);
        // The whole message quotes the line, and even the short one may quote what is in place of something else.
        let what =
            Some(e.message()).filter(|what| !what.contains(PREFIX)).unwrap_or("it is not what it should be");
        format!("line {line}: {what}")
    })?;
    let mut tokens: Vec<Token> = Vec::with_capacity(written.token.len());
    for (number, Entry { name, scopes, sha256 }) in (1..).zip(written.token) {
        check_name(&name).map_err(|why| format!("the name of token {number} {why}"))?;
        if scopes.is_empty() {
            return Err(format!("token {number} ({name}) has no scopes: write read, write or both"));
        }
        let sha256 = unhex(&sha256).ok_or_else(|| {
            format!("sha256 of token {number} ({name}) is not 64 hexadecimal digits: it is the hash, not the token")
        })?;
        if tokens.iter().any(|earlier| earlier.sha256 == sha256) {
            return Err(format!("token {number} ({name}) is there twice"));
        }
        tokens.push(Token { name, scopes, sha256 });
    }
    Ok(tokens)
}

fn check_name(name: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=MAX_NAME_CHARS).contains(&name.len()) && name.chars().all(legal) {
        return Ok(());
    }
    Err(format!("must be 1 to {MAX_NAME_CHARS} characters of A-Z a-z 0-9 . _ -"))
}

/// A token that was made just now. Not printed by `Debug`.
#[expect(missing_debug_implementations, reason = "it would show the token")]
pub struct NewToken {
    /// The token itself, which nobody can tell again.
    pub token: String,
    /// What to append to `auth.tokens_path`.
    pub entry: String,
}

/// Makes a token of 244 random bits.
///
/// # Errors
/// 64 for a name that cannot be one.
pub fn new_token(name: &str, scopes: &[Scope]) -> Result<NewToken, Failure> {
    check_name(name).map_err(|why| Failure::configuration(format!("--name {why}")))?;
    let token = format!("{PREFIX}{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    let sha256 = hex(&Sha256::digest(&token));
    let mut allowed = Vec::new();
    for scope in [Scope::Read, Scope::Write] {
        if scopes.contains(&scope) {
            allowed.push(format!("{:?}", scope.as_str()));
        }
    }
    let scopes = allowed.join(", ");
    let entry = format!("[[token]]\nname = \"{name}\"\nscopes = [{scopes}]\nsha256 = \"{sha256}\"\n");
    Ok(NewToken { token, entry })
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing into a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks(2)) {
        *byte = digit(pair[0])? * 16 + digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a request with these `Authorization` headers gets.
    fn asked(tokens: &Tokens, method: &Method, authorization: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(header::AUTHORIZATION, value.parse().unwrap());
        }
        match tokens.client(&headers, method) {
            Ok(Client(name)) => name,
            Err(Error::TokenMissing) => "401 missing".into(),
            Err(Error::TokenWrong) => "401 wrong".into(),
            Err(Error::ScopeMissing(scope)) => format!("403 {scope}"),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn tokens(text: &str) -> Tokens {
        Tokens { path: PathBuf::new(), known: RwLock::new(parse(text).unwrap().into()) }
    }

    #[test]
    fn only_a_token_of_the_file_opens_and_only_what_it_may() {
        let reader = new_token("reader", &[Scope::Read]).unwrap();
        let writer = new_token("writer", &[Scope::Write]).unwrap();
        let both = new_token("both", &[Scope::Write, Scope::Read]).unwrap();
        let tokens = tokens(&[reader.entry, writer.entry, both.entry].concat());
        let with = |token: &str| format!("Bearer {token}");
        for (token, get, post) in [
            (reader.token, "reader", "403 write"),
            (writer.token, "403 read", "writer"),
            (both.token.clone(), "both", "both"),
        ] {
            assert_eq!(asked(&tokens, &Method::GET, &[&with(&token)]), get);
            assert_eq!(asked(&tokens, &Method::HEAD, &[&with(&token)]), get);
            assert_eq!(asked(&tokens, &Method::POST, &[&with(&token)]), post);
            assert_eq!(asked(&tokens, &Method::DELETE, &[&with(&token)]), post);
        }
        assert_eq!(asked(&tokens, &Method::GET, &[]), "401 missing");
        let right = with(&both.token);
        assert_eq!(asked(&tokens, &Method::GET, &[&format!("bEARER  {} ", both.token)]), "both");
        for wrong in ["", "Bearer", "Bearer ", &both.token, "Basic eDp5", &right[..right.len() - 1]] {
            assert_eq!(asked(&tokens, &Method::GET, &[wrong]), "401 wrong", "{wrong:?}");
        }
        assert_eq!(asked(&tokens, &Method::GET, &[&right, &right]), "401 wrong", "which one is meant?");
    }

    #[test]
    fn a_new_token_is_new_and_its_entry_does_not_hold_it() {
        let [one, other] = [(); 2].map(|()| new_token("shop", &[Scope::Read]).unwrap());
        assert_ne!(one.token, other.token);
        assert_eq!(one.token.len(), PREFIX.len() + 64);
        assert!(!one.entry.contains(&one.token[PREFIX.len()..]));
        assert_eq!(parse(&one.entry).unwrap()[0].scopes, [Scope::Read]);
        assert!(new_token("a b", &[Scope::Read]).is_err());
        assert!(new_token(&"n".repeat(65), &[Scope::Read]).is_err());
    }

    #[test]
    fn a_broken_file_is_told_without_what_it_holds() {
        let good = new_token("shop", &[Scope::Read]).unwrap();
        let hash = good.entry.split('"').nth(5).unwrap();
        assert_eq!(parse("").unwrap(), []);
        assert_eq!(parse(&hash.to_uppercase()).unwrap_err().matches("line 1").count(), 1);
        assert_eq!(
            parse(&good.entry.replace(hash, &hash.to_uppercase())).unwrap(),
            parse(&good.entry).unwrap()
        );
        for (broken, told) in [
            (good.entry.replace(hash, &good.token), "token 1 (shop)"),
            (good.entry.replace(hash, &good.token[..64]), "token 1 (shop)"),
            (good.entry.replace("sha256 = \"", "sha256 = x\""), "line 4"),
            (good.entry.replace("\"read\"", "\"admin\""), "line 3"),
            (good.entry.replace("\"read\"", ""), "no scopes"),
            (good.entry.replace("shop", "a shop"), "the name of token 1"),
            (good.entry.replace("sha256", "token"), "line"),
            (good.entry.repeat(2), "token 2 (shop) is there twice"),
        ] {
            let why = parse(&broken).unwrap_err();
            assert!(why.contains(told), "{why}");
            assert!(!why.contains(hash) && !why.contains(&good.token[..64]), "{why}");
        }
    }
}
