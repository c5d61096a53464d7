//! Several measurements of one thing.

use serde::Serialize;

/// Above this spread of a ratio, (max - min) / median, the ratio says little.
pub(super) const SPREAD_LIMIT: f64 = 0.3;

/// The middle one and the extremes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// None of no numbers. Of an even count the median is the mean of the two in the middle.
    pub(super) fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max })
    }

    /// (max - min) / median.
    pub(super) fn relative(self) -> f64 {
        if self.median > 0.0 { (self.max - self.min) / self.median } else { 0.0 }
    }
}

/// Of sorted numbers; 0 of none.
pub(super) fn percentile(sorted: &[u32], percent: usize) -> u32 {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_the_spread_is_relative_to_it() {
        let odd = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert!((odd.relative() - 1.0).abs() < 1e-9);
        assert!((Spread::of([1.0, 2.0, 3.0, 10.0]).unwrap().median - 2.5).abs() < 1e-9);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn percentiles_are_of_the_sorted_numbers() {
        let numbers: Vec<u32> = (1..=200).collect();
        assert_eq!((percentile(&numbers, 50), percentile(&numbers, 99)), (101, 199));
        assert_eq!((percentile(&[7], 99), percentile(&[], 99)), (7, 0));
    }
}
