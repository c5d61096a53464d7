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

/// How far apart those in the middle half are, in proportion to the median: what a single disturbance does not change.
pub(super) fn middle_half(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (quarter, count) = (sorted.len() / 4, sorted.len());
    let median = Spread::of(sorted.iter().copied())?.median;
    Some((sorted.get(count - 1 - quarter)? - sorted.get(quarter)?) / median)
}

/// Of sorted numbers, that below which so many of a thousand are; 0 of none.
pub(super) fn per_mille(sorted: &[u32], count: usize) -> u32 {
    let index = (sorted.len() * count / 1000).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(0)
}

/// How long something took, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Percentiles {
    pub(super) count: usize,
    pub(super) p50_us: u32,
    pub(super) p95_us: u32,
    pub(super) p99_us: u32,
    pub(super) p999_us: u32,
    pub(super) max_us: u32,
}

impl Percentiles {
    /// Of sorted times; all 0 of none.
    pub(super) fn of(sorted: &[u32]) -> Self {
        Self {
            count: sorted.len(),
            p50_us: per_mille(sorted, 500),
            p95_us: per_mille(sorted, 950),
            p99_us: per_mille(sorted, 990),
            p999_us: per_mille(sorted, 999),
            max_us: sorted.last().copied().unwrap_or(0),
        }
    }
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
    fn one_disturbance_is_not_in_the_middle_half() {
        assert!((middle_half(&[9.0, 1.0, 1.1, 0.9, 1.0]).unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(middle_half(&[]), None);
    }

    #[test]
    fn percentiles_are_of_the_sorted_numbers() {
        let numbers: Vec<u32> = (1..=200).collect();
        assert_eq!((per_mille(&numbers, 500), per_mille(&numbers, 990)), (101, 199));
        assert_eq!((per_mille(&[7], 999), per_mille(&[], 990)), (7, 0));
    }
}
