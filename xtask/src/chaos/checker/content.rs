//! What a row and its record must have alike, as far as it is remembered: hashes.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use serde_json::value::RawValue;

/// Hashes of a record's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) key: u64,
    pub(super) value: u64,
    /// Of all headers but `lsn` and `seq`, whatever their order.
    pub(super) headers: u64,
}

/// Headers by name and value; no value is not an empty one.
pub(super) type Headers = Vec<(String, Option<Vec<u8>>)>;

impl Content {
    pub(super) fn of(key: Option<&[u8]>, value: Option<&[u8]>, mut headers: Headers) -> Self {
        headers.sort();
        Self { key: hash(&key), value: hash(&value), headers: hash(&headers) }
    }

    /// Which parts are not as in another.
    pub(super) fn differences(&self, other: &Self) -> Vec<&'static str> {
        let parts = [
            (self.key == other.key, "the key"),
            (self.value == other.value, "the value"),
            (self.headers == other.headers, "a header"),
        ];
        parts.iter().filter(|(same, _)| !same).map(|(_, part)| *part).collect()
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The headers that a row's own JSON object asks for: text as it is, null without a value, anything else as JSON.
pub(super) fn own_headers(json: &str) -> Result<Headers, String> {
    let object: BTreeMap<String, &RawValue> =
        serde_json::from_str(json).map_err(|error| format!("headers are no JSON object: {error}"))?;
    object.into_iter().map(|(name, raw)| Ok((name, own_header(raw.get())?))).collect()
}

fn own_header(json: &str) -> Result<Option<Vec<u8>>, String> {
    if json == "null" {
        return Ok(None);
    }
    if !json.starts_with('"') {
        return Ok(Some(json.into()));
    }
    let text: String = serde_json::from_str(json).map_err(|error| format!("a header: {error}"))?;
    Ok(Some(text.into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, Option<&str>)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).into(), value.map(|v| v.as_bytes().to_vec()))).collect()
    }

    #[test]
    fn a_rows_own_headers_are_text_nothing_or_json() {
        let own = own_headers(r#"{"a": "it's \"x\"", "b": null, "c": 1.50, "d": {"e": [true]}}"#).unwrap();
        let told =
            [("a", Some("it's \"x\"")), ("b", None), ("c", Some("1.50")), ("d", Some(r#"{"e": [true]}"#))];
        assert_eq!(own, headers(&told));
        own_headers("[]").unwrap_err();
    }

    #[test]
    fn each_part_that_differs_is_named_and_the_order_of_headers_is_none() {
        let of = |key: &str, value: Option<&str>, pairs: &[(&str, Option<&str>)]| {
            Content::of(Some(key.as_bytes()), value.map(str::as_bytes), headers(pairs))
        };
        let one = of("k", Some(""), &[("a", Some("1")), ("b", None)]);
        assert_eq!(one, of("k", Some(""), &[("b", None), ("a", Some("1"))]));
        assert_eq!(one.differences(&of("k", None, &[("a", Some("1")), ("b", None)])), ["the value"]);
        assert_eq!(one.differences(&of("l", Some(""), &[("a", Some("1"))])), ["the key", "a header"]);
        assert_eq!(one.differences(&of("k", Some(""), &[("a", Some("1")), ("b", Some(""))])), ["a header"]);
    }
}
