//! Size classes: geometric thresholds, in extents.
//!
//! `t_0 = 1`, `t_{c+1} = max(t_c + 1, ⌈1.25 · t_c⌉)`. A GPU with room `r` is in every class `c` with `t_c ≤ r`.

/// Thresholds of all classes that 32 bits can hold, ascending.
#[derive(Debug)]
pub(super) struct SizeClasses {
    thresholds: Vec<u32>,
}

impl SizeClasses {
    pub(super) fn new() -> Self {
        let mut thresholds = vec![1_u32];
        let mut last = 1_u32;
        while let Some(next) = last.checked_add(last.div_ceil(4)) {
            thresholds.push(next);
            last = next;
        }
        Self { thresholds }
    }

    /// How many classes room for `units` is in: the classes below this number. O(log classes).
    pub(super) fn num_held(&self, units: u32) -> usize {
        self.thresholds.partition_point(|&t| t <= units)
    }

    /// The room that every GPU of the class has.
    pub(super) fn threshold(&self, class: usize) -> u32 {
        self.thresholds.get(class).copied().unwrap_or(u32::MAX)
    }

    /// The smallest class whose members all have room for `units`, and whether every GPU with that room is in it.
    pub(super) fn round_up(&self, units: u32) -> (usize, bool) {
        let class = self.thresholds.partition_point(|&t| t < units);
        (class, self.thresholds.get(class) == Some(&units))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_grow_by_a_quarter_and_bracket_every_size() {
        let classes = SizeClasses::new();
        assert_eq!(classes.thresholds[..8], [1, 2, 3, 4, 5, 7, 9, 12]);
        assert!(classes.thresholds.len() < 110);
        for units in 1..5000 {
            let (class, is_exact) = classes.round_up(units);
            assert!(classes.thresholds[class] >= units);
            assert_eq!(classes.num_held(units), class + usize::from(is_exact));
        }
    }
}
