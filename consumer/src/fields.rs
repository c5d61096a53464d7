//! The fields of a JSON body, each read by its name: what is wrong, and how, is found field by field. Total: any
//! bytes whatever give a value or a [`Poison`] that says which field and why.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::decide::{Poison, Reason};

/// A field's name and its JSON text, if it is there (null counts as absent).
#[derive(Clone, Copy)]
pub(crate) struct Field<'a>(pub(crate) &'static str, pub(crate) Option<&'a RawValue>);

/// An object, and what of it is asked for; `what` says where it stands.
pub(crate) fn object<'a, T: Deserialize<'a>>(what: &str, json: &'a [u8]) -> Result<T, Poison> {
    // serde would also take an array for a struct, field by field.
    let is_array = json.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    match serde_json::from_slice(json) {
        Ok(_) if is_array => Err(Poison::new(Reason::WrongType, format!("{what} must be an object"))),
        Ok(body) => Ok(body),
        Err(e) if e.is_data() => {
            Err(Poison::new(Reason::WrongType, format!("{what} must be an object: {e}")))
        }
        Err(e) => Err(Poison::new(Reason::NotJson, format!("{what} is not JSON: {e}"))),
    }
}

/// A field's JSON text.
pub(crate) fn present(Field(name, raw): Field<'_>) -> Result<&RawValue, Poison> {
    raw.ok_or_else(|| Poison::new(Reason::MissingField, format!("{name} is missing")))
}

/// A text that is not empty and that Postgres can hold.
pub(crate) fn text(field: Field<'_>) -> Result<String, Poison> {
    let raw = present(field)?;
    let text: String = serde_json::from_str(raw.get()).map_err(|_| wrong_type(field.0, "a string", raw))?;
    if text.contains('\0') {
        return Err(Poison::new(
            Reason::NulCharacter,
            format!("{} holds U+0000, which Postgres cannot store", field.0),
        ));
    }
    if text.is_empty() {
        return Err(bad_value(field.0, "must not be empty"));
    }
    Ok(text)
}

/// An id of the order system's: 1 to 64 of A-Z a-z 0-9 _ -.
pub(crate) fn id(field: Field<'_>) -> Result<String, Poison> {
    let id = text(field)?;
    if is_id(&id) { Ok(id) } else { Err(bad_value(field.0, "must be 1 to 64 of A-Z a-z 0-9 _ -")) }
}

/// Whether it is one.
pub(crate) fn is_id(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (1..=64).contains(&text.len()) && text.bytes().all(legal)
}

/// A UUID.
pub(crate) fn uuid(field: Field<'_>) -> Result<Uuid, Poison> {
    parse_uuid(field.0, &text(field)?)
}

/// An RFC 3339 time.
pub(crate) fn time(field: Field<'_>) -> Result<DateTime<Utc>, Poison> {
    DateTime::parse_from_rfc3339(&text(field)?)
        .map(|t| t.with_timezone(&Utc))
        .map_err(|e| bad_value(field.0, &format!("must be an RFC 3339 time: {e}")))
}

/// An integer of 64 bits.
pub(crate) fn integer(field: Field<'_>) -> Result<i64, Poison> {
    let raw = present(field)?;
    let number = raw.get();
    if !number.starts_with(|c: char| c == '-' || c.is_ascii_digit()) || number.contains(['.', 'e', 'E']) {
        return Err(wrong_type(field.0, "an integer", raw));
    }
    number.parse().map_err(|_| bad_value(field.0, "is too large for 64 bits"))
}

/// A decimal from a JSON string or number, never negative.
pub(crate) fn amount(field: Field<'_>) -> Result<Decimal, Poison> {
    let raw = present(field)?;
    let number = match raw.get().as_bytes().first() {
        Some(b'"') => text(field)?,
        Some(b'-' | b'0'..=b'9') => raw.get().to_owned(),
        _ => return Err(wrong_type(field.0, "a decimal, as a string or a number", raw)),
    };
    // `from_str` would round what does not fit.
    let decimal = Decimal::from_str_exact(&number)
        .or_else(|e| if number.contains(['e', 'E']) { Decimal::from_scientific(&number) } else { Err(e) })
        .map_err(|e| bad_value(field.0, &format!("is not a decimal that fits: {e}")))?;
    if decimal.is_sign_negative() && !decimal.is_zero() {
        return Err(bad_value(field.0, "must not be negative"));
    }
    Ok(decimal)
}

/// A value of the right type that cannot be used all the same.
pub(crate) fn bad_value(name: &str, what: &str) -> Poison {
    Poison::new(Reason::BadValue, format!("{name} {what}"))
}

/// A value of another type.
pub(crate) fn wrong_type(name: &str, wanted: &str, raw: &RawValue) -> Poison {
    let found = excerpt(raw.get().as_bytes());
    Poison::new(Reason::WrongType, format!("{name} must be {wanted}, not {found}"))
}

/// The beginning of what was found, for a message.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    const BYTES_MAX: usize = 80;
    let cut = &bytes[..bytes.len().min(BYTES_MAX)];
    let mut text = String::from_utf8_lossy(cut).into_owned();
    if bytes.len() > BYTES_MAX {
        text.push('…');
    }
    text
}

/// A UUID; `what` says where it stands.
pub(crate) fn parse_uuid(what: &str, text: &str) -> Result<Uuid, Poison> {
    Uuid::parse_str(text).map_err(|e| bad_value(what, &format!("must be a UUID: {e}")))
}

/// Which delivery of a message it is: from 1, in 32 bits.
pub(crate) fn parse_attempt(what: &str, text: &str) -> Result<i32, Poison> {
    text.parse()
        .ok()
        .filter(|attempt| *attempt >= 1)
        .ok_or_else(|| bad_value(what, "must be a number from 1 to 2147483647"))
}

/// A log sequence number as Postgres writes it: two numbers of 32 bits, in hexadecimal, with a slash.
pub(crate) fn parse_lsn(what: &str, text: &str) -> Result<String, Poison> {
    let half = |half: &str| (1..=8).contains(&half.len()) && half.bytes().all(|b| b.is_ascii_hexdigit());
    let fits = text.split_once('/').is_some_and(|(high, low)| half(high) && half(low));
    if fits {
        Ok(text.to_owned())
    } else {
        Err(bad_value(what, "must be a log sequence number such as 0/16B3748"))
    }
}
