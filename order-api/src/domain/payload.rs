//! What a message says: JSON, looked at before Postgres has to.

use std::collections::HashSet;

use serde::Serialize;
use serde_json::value::RawValue;

/// The largest payload, in bytes as Postgres writes it: with key and headers it fits into what a Kafka topic takes by default
/// (`max.message.bytes`, 1048588). A larger one would be the relay's to refuse, after the client was told that all is well.
pub const MAX_PAYLOAD_BYTES: usize = 900 * 1024;

/// How deep a payload may be nested; many parsers of JSON end at 128.
pub const MAX_PAYLOAD_DEPTH: usize = 100;

/// How many digits a number of a payload may have when it is written without an exponent, as Postgres writes it. Every
/// float of 64 bits has fewer.
pub const MAX_NUMBER_DIGITS: i64 = 400;

/// What a message says: any JSON that Postgres stores, and writes again in bounded space.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Payload(Box<RawValue>);

impl Payload {
    /// Takes a JSON value, as text, that Postgres writes in at most so many bytes.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(json: &RawValue, most_bytes: usize) -> Result<Self, String> {
        let bytes = written_bytes(json.get())?;
        if bytes > most_bytes {
            return Err(format!(
                "has up to {bytes} bytes when its numbers are written without exponents; at most are {most_bytes}"
            ));
        }
        Ok(Self(json.to_owned()))
    }

    /// What the database holds.
    pub(crate) fn stored(json: String) -> Result<Self, serde_json::Error> {
        RawValue::from_string(json).map(Self)
    }

    /// The JSON.
    pub fn as_str(&self) -> &str {
        self.0.get()
    }
}

/// In how many bytes at most Postgres writes the JSON text as `jsonb`: with a space behind every comma and colon, and
/// numbers without exponents, by which a few bytes could become 128 KiB.
fn written_bytes(json: &str) -> Result<usize, String> {
    let bytes = json.as_bytes();
    // The names in each open object so far; an array has none.
    let mut open: Vec<HashSet<String>> = Vec::new();
    let (mut at, mut written) = (0, 0);
    while let Some(byte) = bytes.get(at) {
        let end = match byte {
            b'"' => string_end(bytes, at),
            b'-' | b'0'..=b'9' => {
                end_of(bytes, at, |b| !matches!(b, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E'))
            }
            _ => at + 1,
        };
        let token = json.get(at..end).unwrap_or_default();
        written += match byte {
            b'"' => {
                let text = string(token)?;
                let next = bytes.get(end_of(bytes, end, |b| !b.is_ascii_whitespace()));
                if next == Some(&b':') && !open.last_mut().is_none_or(|names| names.insert(text)) {
                    let name: String = token.chars().take(100).collect();
                    return Err(format!("has an object with more than one member {name}"));
                }
                token.len()
            }
            b'-' | b'0'..=b'9' => number(token)?,
            b'{' | b'[' => {
                open.push(HashSet::new());
                if open.len() > MAX_PAYLOAD_DEPTH {
                    return Err(format!("is nested more than {MAX_PAYLOAD_DEPTH} deep"));
                }
                1
            }
            b'}' | b']' => {
                open.pop();
                1
            }
            b',' | b':' => 2,
            b' ' | b'\t' | b'\n' | b'\r' => 0,
            _ => 1,
        };
        at = end;
    }
    Ok(written)
}

/// Where the first byte like that is, from `at` on, or the end.
fn end_of(bytes: &[u8], at: usize, is: impl Fn(u8) -> bool) -> usize {
    bytes.iter().skip(at).position(|b| is(*b)).map_or(bytes.len(), |length| at + length)
}

/// Behind the quote that ends the string that begins here.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    loop {
        match bytes.get(at) {
            Some(b'\\') => at += 2,
            Some(b'"') => return at + 1,
            Some(_) => at += 1,
            None => return bytes.len(),
        }
    }
}

/// The text of a JSON string.
fn string(token: &str) -> Result<String, String> {
    let text: String =
        serde_json::from_str(token).map_err(|_| "has a string with half of a surrogate pair".to_owned())?;
    if text.contains('\0') {
        return Err("has a string with U+0000, which Postgres cannot store".into());
    }
    Ok(text)
}

/// How long a number is when it is written without an exponent.
fn number(token: &str) -> Result<usize, String> {
    let too_long = || format!("has a number of more than {MAX_NUMBER_DIGITS} digits");
    // Many parsers of JSON fail at what is beyond, or make an infinity of it.
    if !token.parse::<f64>().is_ok_and(f64::is_finite) {
        return Err("has a number beyond what a float of 64 bits holds".into());
    }
    let (mantissa, exponent) = token.split_once(['e', 'E']).unwrap_or((token, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let length = |digits: &str| i64::try_from(digits.len()).map_err(|_| too_long());
    let exponent: i32 = exponent.parse().map_err(|_| too_long())?;
    let before = (length(whole.trim_start_matches('-'))? + i64::from(exponent)).max(1);
    let after = (length(fraction)? - i64::from(exponent)).max(0);
    if before + after > MAX_NUMBER_DIGITS {
        return Err(too_long());
    }
    let sign_and_point = i64::from(whole.starts_with('-')) + i64::from(after > 0);
    usize::try_from(before + after + sign_and_point).map_err(|_| too_long())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(json: &str) -> String {
        written_bytes(json).unwrap_err()
    }

    #[test]
    fn it_is_as_long_as_postgres_writes_it_at_most() {
        for (json, bytes) in [
            ("1", 1),
            ("true", 4),
            (" [ 1 , 2 ] ", 6),
            (r#"{"a": null}"#, 11),
            (r#""a\"{[""#, 7),
            ("1e10", 11),
            ("-1.5e-3", 7),
            ("0e5", 6),
        ] {
            assert_eq!(written_bytes(json), Ok(bytes), "{json}");
        }
        let raw: &RawValue = serde_json::from_str("[1e99]").unwrap();
        assert_eq!(Payload::parse(raw, 102).unwrap().as_str(), "[1e99]");
        assert!(Payload::parse(raw, 101).unwrap_err().contains("at most are 101"));
    }

    #[test]
    fn what_postgres_cannot_store_is_told() {
        for json in [r#""\u0000""#, r#"[{"a\u0000": 1}]"#, r#"{"a": {"b": ["x\u0000y"]}}"#] {
            assert!(wrong(json).contains("U+0000"), "{json}");
        }
        for json in [r#""\ud800""#, r#"["\udc00\ud800"]"#] {
            assert!(wrong(json).contains("surrogate"), "{json}");
        }
        written_bytes(r#"["\\u0000", "\ud83d\ude00"]"#).unwrap();
        for json in [r#"{"a": 1, "a": 2}"#, r#"[{"b": {"a": 1, "\u0061" : 2}}]"#] {
            assert!(wrong(json).contains("more than one member"), "{json}");
        }
        written_bytes(r#"{"a": {"a": ["a", "a"]}, "b": {"a": "a"}}"#).unwrap();
    }

    #[test]
    fn depth_and_digits_have_limits() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        written_bytes(&nested(MAX_PAYLOAD_DEPTH)).unwrap();
        assert!(wrong(&nested(MAX_PAYLOAD_DEPTH + 1)).contains("nested"));
        for (under, over) in [
            ("1e-399", "1e-400"),
            ("-1E-399", "-1E-400"),
            ("10e-399", "10e-400"),
            ("0.1e-398", "0.1e-399"),
            (&format!("0.{}", "9".repeat(399)), &format!("0.{}", "9".repeat(400))),
            (
                &format!("{}.{}", "9".repeat(300), "9".repeat(100)),
                &format!("{}.{}", "9".repeat(300), "9".repeat(101)),
            ),
            ("0e0", "0e400"),
            ("0e0", "0e99999999999999999999"),
            ("0", "0e-2147483648"),
        ] {
            written_bytes(under).unwrap();
            assert!(wrong(over).contains("digits"), "{over}");
        }
        // The largest and the smallest that a float of 64 bits holds.
        for json in ["1.7976931348623157e308", "-4.9406564584124654e-324"] {
            written_bytes(json).unwrap();
        }
        for json in ["1.8e308", "-1e309", &"9".repeat(310), "1e131071"] {
            assert!(wrong(json).contains("float"), "{json}");
        }
    }
}
