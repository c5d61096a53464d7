//! Amounts of money: exact decimals, never floats.

use std::fmt;

use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The highest price of one item. With the limits on quantity and items no total can overflow.
pub const MAX_PRICE: Decimal = Decimal::from_parts(1_000_000_000, 0, 0, false, 0);

/// The most decimals any currency has.
const MAX_DECIMALS: u32 = 4;

/// Reads a decimal from its text, exactly. The grammar is that of a JSON number, exponent included.
///
/// # Errors
/// What is wrong, in words: not a number, or not representable without loss (28 digits are).
pub fn parse_decimal(text: &str) -> Result<Decimal, String> {
    let not_a_number = || "must be a decimal number such as 12.50".to_owned();
    let too_long = || "has more digits than can be kept exactly".to_owned();
    let (negative, unsigned) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) if is_digits(fraction) => (whole, fraction),
        Some(_) => return Err(not_a_number()),
        None => (mantissa, ""),
    };
    if !is_digits(whole) || (whole.len() > 1 && whole.starts_with('0')) {
        return Err(not_a_number());
    }
    let shift: i64 = match exponent {
        None => 0,
        Some(exponent) if is_digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent)) => {
            exponent.parse().map_err(|_| too_long())?
        }
        Some(_) => return Err(not_a_number()),
    };

    // The value is `digits` times ten to the `power`, without zeros at either end.
    let all = [whole, fraction].concat();
    let leading = all.trim_start_matches('0');
    let digits = leading.trim_end_matches('0');
    if digits.is_empty() {
        return Ok(Decimal::ZERO);
    }
    let trailing = i64::try_from(leading.len() - digits.len()).map_err(|_| too_long())?;
    let decimals = i64::try_from(fraction.len()).map_err(|_| too_long())?;
    let power = shift.checked_sub(decimals).and_then(|p| p.checked_add(trailing)).ok_or_else(too_long)?;
    if digits.len() > 28 || !(-28..=28).contains(&power) {
        return Err(too_long());
    }
    let unscaled: i128 = digits.parse().map_err(|_| too_long())?;
    let unscaled = if negative { -unscaled } else { unscaled };
    let magnitude = u32::try_from(power.unsigned_abs()).map_err(|_| too_long())?;
    let (unscaled, scale) = if power > 0 {
        let factor = 10_i128.pow(magnitude);
        (unscaled.checked_mul(factor).ok_or_else(too_long)?, 0)
    } else {
        (unscaled, magnitude)
    };
    Decimal::try_from_i128_with_scale(unscaled, scale).map_err(|_| too_long())
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// An ISO 4217 code: three capital letters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Currency(String);

impl TryFrom<String> for Currency {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(text)
    }
}

impl From<Currency> for String {
    fn from(value: Currency) -> Self {
        value.0
    }
}

impl Default for Currency {
    fn default() -> Self {
        Self("EUR".into())
    }
}

impl Currency {
    /// Takes three capital letters.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        if text.len() == 3 && text.bytes().all(|b| b.is_ascii_uppercase()) {
            return Ok(Self(text));
        }
        Err("must be the three capital letters of an ISO 4217 currency, such as EUR".into())
    }

    /// The code itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// How many decimals the currency's smallest unit has (ISO 4217's minor unit).
    pub fn decimals(&self) -> u32 {
        match self.as_str() {
            "BIF" | "CLP" | "DJF" | "GNF" | "ISK" | "JPY" | "KMF" | "KRW" | "PYG" | "RWF" | "UGX" | "UYI"
            | "VND" | "VUV" | "XAF" | "XOF" | "XPF" => 0,
            "BHD" | "IQD" | "JOD" | "KWD" | "LYD" | "OMR" | "TND" => 3,
            "CLF" | "UYW" => 4,
            _ => 2,
        }
    }
}

/// An amount that is not negative, always written with its currency's number of decimals: `12.50`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Amount(Decimal);

impl Amount {
    /// Takes the price of one item: 0 to [`MAX_PRICE`] with no more decimals than the currency has. Without
    /// a currency (because that is wrong itself) the most that any has are allowed.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn price(value: Decimal, currency: Option<&Currency>) -> Result<Self, String> {
        if value.is_sign_negative() && !value.is_zero() {
            return Err("must not be negative".into());
        }
        if value > MAX_PRICE {
            return Err(format!("must be at most {MAX_PRICE}"));
        }
        let decimals = currency.map_or(MAX_DECIMALS, Currency::decimals);
        if value.normalize().scale() > decimals {
            let of = currency.map_or("any currency", Currency::as_str);
            return Err(format!("must have at most {decimals} decimals, as {of} has"));
        }
        Ok(Self::of(value, decimals))
    }

    /// A value that is known to be right (computed, or read from the database).
    pub(crate) fn of(value: Decimal, decimals: u32) -> Self {
        let mut value = value.normalize();
        value.rescale(decimals.max(value.scale()));
        Self(value)
    }

    /// The number itself.
    pub fn value(self) -> Decimal {
        self.0
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads what [`Amount`] writes: the text has its currency's decimals already.
impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Decimal::from_str_exact(&text).map(Self).map_err(de::Error::custom)
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decimal(text: &str) -> String {
        parse_decimal(text).unwrap().to_string()
    }

    #[test]
    fn numbers_are_read_exactly_or_not_at_all() {
        for (text, value) in [
            ("0", "0"),
            ("-0.00", "0"),
            ("0.1", "0.1"),
            ("1e2", "100"),
            ("1.50E+1", "15"),
            ("12e-1", "1.2"),
            ("-3.10", "-3.1"),
            ("0e400", "0"),
            ("0.1234567890123456789012345678", "0.1234567890123456789012345678"),
            ("9999999999999999999999999999", "9999999999999999999999999999"),
            ("1e28", "10000000000000000000000000000"),
        ] {
            assert_eq!(decimal(text), value, "{text}");
        }
        for bad in
            ["1e400", "1e-400", "1e99999999999999999999", "1e29", &"9".repeat(29), &"1".repeat(100_000)]
        {
            assert!(parse_decimal(bad).unwrap_err().contains("digits"), "{bad}");
        }
        for bad in
            ["", "-", "+1", "01", "1.", ".5", "1e", "1e+", "0x1", "1,5", " 1", "NaN", "1_0", "--1", "1.2.3"]
        {
            assert!(parse_decimal(bad).unwrap_err().contains("12.50"), "{bad}");
        }
    }

    #[test]
    fn prices_have_their_currencys_decimals() {
        let price = |text: &str, currency: &str| {
            let currency = Currency::parse(currency).unwrap();
            Amount::price(parse_decimal(text).unwrap(), Some(&currency)).map(|a| a.to_string())
        };
        assert_eq!(price("6.5", "EUR").unwrap(), "6.50");
        assert_eq!(price("6.500", "EUR").unwrap(), "6.50");
        assert_eq!(price("0", "EUR").unwrap(), "0.00");
        assert_eq!(price("-0", "EUR").unwrap(), "0.00");
        assert_eq!(price("650", "JPY").unwrap(), "650");
        assert_eq!(price("1.005", "KWD").unwrap(), "1.005");
        assert_eq!(price("1000000000", "EUR").unwrap(), "1000000000.00");
        assert!(price("1000000000.01", "EUR").unwrap_err().contains("at most 1000000000"));
        assert!(price("1.005", "EUR").unwrap_err().contains("2 decimals"));
        assert!(price("0.5", "JPY").unwrap_err().contains("0 decimals"));
        assert!(price("-0.01", "EUR").unwrap_err().contains("negative"));
        assert!(Amount::price(parse_decimal("1.00001").unwrap(), None).is_err());
    }

    #[test]
    fn currencies_are_three_capitals() {
        Currency::parse("USD").unwrap();
        for bad in ["", "EU", "EURO", "eur", "E1R", "€", "EU\0"] {
            Currency::parse(bad).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            let _ = parse_decimal(&text);
        }

        /// The naive model: an integer of the smallest unit, moved by the exponent.
        #[test]
        fn moving_the_point_changes_nothing(cents in 0_i64..1_000_000_000_000, shift in 0_u32..10) {
            let expected = Decimal::new(cents, 2);
            let moved = Decimal::from_i128_with_scale(i128::from(cents), 2 + shift);
            prop_assert_eq!(parse_decimal(&format!("{moved}e{shift}")).unwrap(), expected);
            prop_assert_eq!(parse_decimal(&format!("{cents}e-2")).unwrap(), expected);
            prop_assert_eq!(parse_decimal(&expected.to_string()).unwrap(), expected);
        }
    }
}
