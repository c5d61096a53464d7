//! Reading a JSON body: bounded, in time, and so that every wrong field is told at once by its JSON pointer.
//! Values stay raw text until whoever knows the field parses them, so no number passes through a float.

use std::fmt;

use axum::{
    body::to_bytes,
    extract::Request,
    http::{HeaderMap, header},
};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use service::problem::FieldError;
use tokio::time::{Instant, timeout_at};

use super::{Context, middleware::Deadline};
use crate::error::Error;

/// No object of ours has nearly as many members; beyond it we stop keeping them.
const MAX_MEMBERS: usize = 64;

/// How many wrong fields one answer lists.
const MAX_ERRORS: usize = 50;

/// How much of an unknown field's name is repeated, in characters.
const MAX_NAME_CHARS: usize = 100;

/// The body as text, once it is known to be one JSON value.
pub(super) async fn read(request: Request, context: &Context) -> Result<String, Error> {
    if !is_json(request.headers()) {
        return Err(Error::NotJson);
    }
    check(text(request, context).await?)
}

/// The same, but there may be no body: then the text is empty, whatever it is declared as.
pub(super) async fn read_optional(request: Request, context: &Context) -> Result<String, Error> {
    let is_json = is_json(request.headers());
    match text(request, context).await? {
        none if none.is_empty() => Ok(none),
        _ if !is_json => Err(Error::NotJson),
        text => check(text),
    }
}

fn check(text: String) -> Result<String, Error> {
    // The parser's messages end with the line and the column.
    serde_json::from_str::<&RawValue>(&text).map_err(|e| Error::Malformed(sentence(&e)))?;
    Ok(text)
}

async fn text(request: Request, context: &Context) -> Result<String, Error> {
    let (limit_bytes, timeout) = (context.body_limit_bytes, context.request_timeout);
    let declared = request.headers().get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > limit_bytes as u64) {
        return Err(Error::TooLarge(limit_bytes));
    }
    let deadline = request.extensions().get().map_or_else(|| Instant::now() + timeout, |d: &Deadline| d.0);
    let body = timeout_at(deadline, to_bytes(request.into_body(), limit_bytes)).await;
    let body = match body {
        Err(_) => return Err(Error::BodyTimeout(timeout)),
        Ok(Err(e)) if is_too_large(&e) => return Err(Error::TooLarge(limit_bytes)),
        Ok(Err(_)) => return Err(Error::BodyLost),
        Ok(Ok(body)) => body,
    };
    String::from_utf8(body.into())
        .map_err(|e| Error::Malformed(format!("Not UTF-8 from byte {} on.", e.utf8_error().valid_up_to())))
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn is_too_large(error: &axum::Error) -> bool {
    // The only other error is the connection's; the limit's type is not nameable from here.
    std::error::Error::source(error).is_some_and(|e| e.to_string().contains("length limit"))
}

fn sentence(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| format!("{}{}.", first.to_uppercase(), chars.as_str()))
}

/// The wrong fields found so far, at most [`MAX_ERRORS`].
#[derive(Debug, Default)]
pub(super) struct Errors {
    listed: Vec<FieldError>,
    more: usize,
}

impl Errors {
    pub(super) fn add(&mut self, pointer: impl Into<String>, detail: impl Into<String>) {
        if self.listed.len() < MAX_ERRORS {
            self.listed.push(FieldError { pointer: pointer.into(), detail: detail.into() });
        } else {
            self.more += 1;
        }
    }

    /// The value, or everything that is wrong.
    pub(super) fn or<T>(mut self, value: Option<T>) -> Result<T, Error> {
        match value {
            Some(value) if self.listed.is_empty() => Ok(value),
            _ => {
                if self.more > 0 {
                    let detail = format!("and {} more fields are wrong", self.more);
                    self.listed.push(FieldError { pointer: String::new(), detail });
                }
                Err(Error::Invalid(self.listed))
            }
        }
    }
}

/// A field of an object: where it is and its text.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) pointer: String,
    pub(super) raw: &'a RawValue,
}

impl<'a> Field<'a> {
    /// The whole body, which [`read`] has found to be JSON.
    pub(super) fn root(text: &'a str) -> Result<Self, Error> {
        let raw = serde_json::from_str(text).map_err(|e| Error::Malformed(sentence(&e)))?;
        Ok(Self { pointer: String::new(), raw })
    }

    /// Its members, of which `known` are the names there may be.
    pub(super) fn object(&self, known: &'static [&'static str], errors: &mut Errors) -> Option<Object<'a>> {
        let object = self.any_object(errors)?;
        for (index, (name, _)) in object.members.iter().enumerate() {
            let twice = object.members[..index].iter().any(|(earlier, _)| earlier == name);
            if !twice && !known.contains(&name.as_str()) {
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                errors.add(self.member(name), format!("unknown field; known are {known}"));
            }
        }
        Some(object)
    }

    /// Its members, whatever their names are.
    pub(super) fn any_object(&self, errors: &mut Errors) -> Option<Object<'a>> {
        if !self.raw.get().starts_with('{') {
            errors.add(&self.pointer, "must be an object");
            return None;
        }
        let members = match serde_json::from_str::<Members<'a>>(self.raw.get()) {
            Ok(members) => members,
            Err(e) => {
                errors.add(&self.pointer, e.to_string());
                return None;
            }
        };
        if members.too_many {
            errors.add(&self.pointer, format!("has more than {MAX_MEMBERS} fields"));
        }
        for (index, (name, _)) in members.kept.iter().enumerate() {
            if members.kept[..index].iter().any(|(earlier, _)| earlier == name) {
                errors.add(self.member(name), "is given more than once");
            }
        }
        Some(Object { pointer: self.pointer.clone(), members: members.kept })
    }

    /// Whether it is JSON's null.
    pub(super) fn is_null(&self) -> bool {
        self.raw.get() == "null"
    }

    fn member(&self, name: &str) -> String {
        member(&self.pointer, name)
    }

    /// Its elements, of which there must be 1 to `most`.
    pub(super) fn array(&self, most: usize, errors: &mut Errors) -> Option<Vec<Field<'a>>> {
        if !self.raw.get().starts_with('[') {
            errors.add(&self.pointer, "must be an array");
            return None;
        }
        let elements = match serde_json::from_str::<Vec<&'a RawValue>>(self.raw.get()) {
            Ok(elements) => elements,
            Err(e) => {
                errors.add(&self.pointer, e.to_string());
                return None;
            }
        };
        if elements.is_empty() || elements.len() > most {
            errors.add(&self.pointer, format!("must have 1 to {most} elements, but has {}", elements.len()));
            return None;
        }
        let at = |(index, raw)| Field { pointer: format!("{}/{index}", self.pointer), raw };
        Some(elements.into_iter().enumerate().map(at).collect())
    }

    /// A string, as `parse` understands it.
    pub(super) fn string<T>(
        &self,
        errors: &mut Errors,
        parse: impl FnOnce(String) -> Result<T, String>,
    ) -> Option<T> {
        if !self.raw.get().starts_with('"') {
            errors.add(&self.pointer, "must be a string");
            return None;
        }
        // What can still be wrong is half of a surrogate pair.
        let text = serde_json::from_str::<String>(self.raw.get()).map_err(|e| e.to_string());
        text.and_then(parse).map_err(|detail| errors.add(&self.pointer, detail)).ok()
    }

    /// A number's own text, as `parse` understands it; with `quoted`, a string that holds one will do.
    pub(super) fn number<T>(
        &self,
        quoted: bool,
        errors: &mut Errors,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.raw.get();
        let is_number = text.starts_with(|c: char| c == '-' || c.is_ascii_digit());
        let parsed = match serde_json::from_str::<String>(text) {
            _ if is_number => parse(text),
            Ok(inner) if quoted => parse(&inner),
            _ if quoted => Err("must be a number, or a string that holds one".into()),
            _ => Err("must be a number".into()),
        };
        parsed.map_err(|detail| errors.add(&self.pointer, detail)).ok()
    }
}

/// Where a member of an object is.
fn member(object: &str, name: &str) -> String {
    let name: String = name.chars().take(MAX_NAME_CHARS).collect();
    format!("{object}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// An object whose unknown members have been told.
#[derive(Debug)]
pub(super) struct Object<'a> {
    pointer: String,
    members: Vec<(String, &'a RawValue)>,
}

impl<'a> Object<'a> {
    /// The member of that name, whatever it is.
    pub(super) fn given(&self, name: &str) -> Option<Field<'a>> {
        let (_, raw) = self.members.iter().find(|(n, _)| n == name)?;
        Some(Field { pointer: format!("{}/{name}", self.pointer), raw })
    }

    /// All members and their names.
    pub(super) fn all(&self) -> impl ExactSizeIterator<Item = (&str, Field<'a>)> {
        self.members
            .iter()
            .map(|(name, raw)| (name.as_str(), Field { pointer: member(&self.pointer, name), raw }))
    }

    /// The member of that name; null is the same as none.
    pub(super) fn optional(&self, name: &str) -> Option<Field<'a>> {
        self.given(name).filter(|field| !field.is_null())
    }

    /// The member of that name, which there must be.
    pub(super) fn required(&self, name: &str, errors: &mut Errors) -> Option<Field<'a>> {
        let field = self.optional(name);
        if field.is_none() {
            errors.add(format!("{}/{name}", self.pointer), "is required");
        }
        field
    }
}

/// An object's members as they stand, repetitions included (which a map would hide).
struct Members<'a> {
    kept: Vec<(String, &'a RawValue)>,
    too_many: bool,
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Members { kept: Vec::new(), too_many: false };
                while members.kept.len() < MAX_MEMBERS {
                    match map.next_entry()? {
                        Some(member) => members.kept.push(member),
                        None => return Ok(members),
                    }
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    members.too_many = true;
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(Collect)
    }
}
