//! Text that has been looked at: ids, names, the trace context.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The longest name of an item, in characters.
pub const MAX_NAME_CHARS: usize = 200;

/// The longest notes, in characters.
pub const MAX_NOTES_CHARS: usize = 1000;

/// The longest reason for a cancellation, in characters.
pub const MAX_REASON_CHARS: usize = 500;

/// The longest key of a message, in characters.
pub const MAX_MESSAGE_KEY_CHARS: usize = 512;

/// The longest id, in bytes (which are characters: ids are ASCII).
pub(crate) const MAX_ID_BYTES: usize = 64;

fn is_id(text: &str) -> bool {
    (1..=MAX_ID_BYTES).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

macro_rules! ids {
    ($($(#[$about:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                Self::parse(text)
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl $name {
            /// Takes 1 to 64 characters of `A-Z a-z 0-9 _ -`.
            ///
            /// # Errors
            /// What is wrong, in words.
            pub fn parse(text: impl Into<String>) -> Result<Self, String> {
                let text = text.into();
                if is_id(&text) {
                    return Ok(Self(text));
                }
                Err(format!("must be 1 to {MAX_ID_BYTES} characters of A-Z a-z 0-9 _ -"))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+};
}

ids! {
    /// Which order. Ours are UUIDs of version 7; a client's may be any id.
    OrderId,
    /// Who ordered.
    CustomerId,
    /// Who prepares the order.
    RestaurantId,
    /// What was ordered.
    MenuItemId,
    /// How it was paid, by the payment system's own id.
    PaymentId,
}

impl OrderId {
    /// A new one, later in order than those before it.
    pub fn generate() -> Self {
        Self(Uuid::now_v7().to_string())
    }
}

/// Which characters a text for people may have besides those that are none of Unicode's control characters. NUL, which
/// Postgres cannot store, is never one.
const LINE_BREAKS: &[char] = &['\n', '\r', '\t'];

macro_rules! texts {
    ($($(#[$about:meta])* $name:ident: $most:ident, $also:expr;)+) => {$(
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            #[doc = concat!("Takes 1 to [`", stringify!($most), "`] characters.")]
            ///
            /// # Errors
            /// What is wrong, in words.
            pub fn parse(text: impl Into<String>) -> Result<Self, String> {
                let text = text.into();
                if text.trim().is_empty() {
                    return Err("must not be blank".into());
                }
                if text.chars().count() > $most {
                    return Err(format!("must have at most {} characters", $most));
                }
                if text.chars().any(|c| c.is_control() && !$also.contains(&c)) {
                    return Err("must not contain control characters".into());
                }
                Ok(Self(text))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                Self::parse(text)
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }
    )+};
}

texts! {
    /// What an item is called, for people: not blank, no control characters.
    ItemName: MAX_NAME_CHARS, [] as [char; 0];
    /// What the customer wants known about the order: not blank, lines and tabs allowed.
    Notes: MAX_NOTES_CHARS, LINE_BREAKS;
    /// Why an order was called off: not blank, lines and tabs allowed.
    Reason: MAX_REASON_CHARS, LINE_BREAKS;
    /// What keeps messages in order among each other, the record's key: not blank, no control characters.
    MessageKey: MAX_MESSAGE_KEY_CHARS, [] as [char; 0];
}

/// A valid W3C `traceparent`, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traceparent(String);

impl Traceparent {
    /// The trace context, or nothing if it is not one: the recommendation says to go on without then.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let version = parts.next()?;
        let (trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?);
        let hex = |part: &str, length: usize| {
            part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let zero = |part: &str| part.bytes().all(|b| b == b'0');
        let well_formed = hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
        // Version 00 has four fields; a later one may append some.
        let length_fits = if version == "00" { parts.next().is_none() } else { text.len() <= 512 };
        (well_formed && version != "ff" && !zero(trace) && !zero(parent) && length_fits)
            .then(|| Self(text.into()))
    }

    /// The header's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_one_to_64_plain_characters() {
        for good in ["a", "A_z-09", &"x".repeat(64), OrderId::generate().as_str()] {
            assert_eq!(OrderId::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", &"x".repeat(65), "a b", "a/b", "é", "a\0", "a\n", "'"] {
            OrderId::parse(bad).unwrap_err();
        }
    }

    #[test]
    fn generated_ids_are_version_7() {
        let id = OrderId::generate();
        assert_eq!(Uuid::parse_str(id.as_str()).unwrap().get_version_num(), 7);
    }

    #[test]
    fn names_are_counted_in_characters() {
        for good in ["x", "Crème brûlée", &"é".repeat(MAX_NAME_CHARS)] {
            ItemName::parse(good).unwrap();
        }
        for bad in ["", " ", "a\0b", "a\tb", "a\u{85}b", &"é".repeat(MAX_NAME_CHARS + 1)] {
            ItemName::parse(bad).unwrap_err();
        }
    }

    #[test]
    fn traceparent_is_as_the_recommendation_says() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for good in [good, &format!("cc{}-what-follows", &good[2..])] {
            assert_eq!(Traceparent::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "00",
            &good.to_uppercase(),
            &good[..54],
            &format!("{good}-more"),
            &format!("ff{}", &good[2..]),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert_eq!(Traceparent::parse(bad), None, "{bad}");
        }
    }
}
