//! The log sequence number: a position in Postgres' write-ahead log.

use std::{fmt, str::FromStr};

/// A byte position in the write-ahead log, printed as Postgres prints it: two hexadecimal halves, `16/B374D848`
/// (<https://www.postgresql.org/docs/current/datatype-pg-lsn.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `0/0`, which Postgres never uses for a record: "no position".
    pub const ZERO: Self = Self(0);

    /// Bytes of log from `earlier` up to here; 0 when `earlier` is not earlier.
    pub fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    /// By hand, because every transaction's is written into headers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A slash before each half, the first of which is left out.
        let mut text = [b'/'; 18];
        let mut start = text.len();
        for mut half in [self.0 & 0xFFFF_FFFF, self.0 >> 32] {
            loop {
                start -= 1;
                text[start] = b"0123456789ABCDEF"[(half & 0xF) as usize];
                half >>= 4;
                if half == 0 {
                    break;
                }
            }
            start -= 1;
        }
        f.write_str(str::from_utf8(&text[start + 1..]).unwrap_or_default())
    }
}

/// The text was not an LSN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotAnLsn(pub String);

impl fmt::Display for NotAnLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not an LSN such as 16/B374D848", self.0)
    }
}

impl std::error::Error for NotAnLsn {}

impl FromStr for Lsn {
    type Err = NotAnLsn;

    fn from_str(text: &str) -> Result<Self, NotAnLsn> {
        let half = |digits: &str| {
            // from_str_radix would take a sign.
            let plain = digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
        };
        let parsed = text.split_once('/').and_then(|(high, low)| Some((half(high)?, half(low)?)));
        let (high, low) = parsed.ok_or_else(|| NotAnLsn(text.to_owned()))?;
        Ok(Self(u64::from(high) << 32 | u64::from(low)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn is_printed_as_postgres_prints_it() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!(Lsn(0x1_0000_0000).to_string(), "1/0");
        assert_eq!("FFFFFFFF/FFFFFFFF".parse(), Ok(Lsn(u64::MAX)));
        for bad in ["", "/", "1", "1/", "/1", "+1/1", "1/-1", "123456789/0", "1/0 ", "g/0"] {
            assert_eq!(bad.parse::<Lsn>(), Err(NotAnLsn(bad.into())));
        }
    }

    proptest! {
        #[test]
        fn text_and_back_is_the_same(n: u64) {
            prop_assert_eq!(Lsn(n).to_string().parse(), Ok(Lsn(n)));
        }

        #[test]
        fn parsing_is_total(text: String) {
            let _ = text.parse::<Lsn>();
        }
    }
}
