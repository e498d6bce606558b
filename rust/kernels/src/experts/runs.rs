//! The pairs of token and pick, sorted by expert.

use std::ops::Range;

use crate::rows::NOWHERE;

/// What experts compute of a step: each a run of rows, one behind the other.
#[derive(Default)]
pub(super) struct Runs {
    /// Where each expert's run begins; and where the last one ends.
    starts: Vec<usize>,
    /// Of each row its token.
    tokens: Vec<i64>,
    /// Of each pair its row.
    places: Vec<u32>,
}

impl Runs {
    /// Sorts the picks of tokens, so many each, among `count` experts with numbers from `first` on.
    ///
    /// Those of an expert stay in the order of the tokens; picks of other experts have no row.
    pub(super) fn sort(&mut self, chosen: &[i32], picks: usize, first: i32, count: usize) {
        let own = |number: i32| {
            let place = usize::try_from(i64::from(number) - i64::from(first));
            place.ok().filter(|place| *place < count)
        };
        // First how many an expert has, behind its own place; then where its run begins; and there, one row after another.
        self.starts.clear();
        self.starts.resize(count + 1, 0);
        for expert in chosen.iter().filter_map(|number| own(*number)) {
            self.starts[expert + 1] += 1;
        }
        for expert in 0..count {
            self.starts[expert + 1] += self.starts[expert];
        }
        self.tokens.clear();
        self.tokens.resize(self.starts[count], 0);
        self.places.clear();
        for (pair, number) in chosen.iter().enumerate() {
            let Some(expert) = own(*number) else {
                self.places.push(NOWHERE);
                continue;
            };
            let row = self.starts[expert];
            self.starts[expert] += 1;
            self.tokens[row] = (pair / picks) as i64;
            self.places.push(row as u32);
        }
        // Each now says where its run ends, which is where the next one's begins.
        self.starts.rotate_right(1);
        self.starts[0] = 0;
    }

    /// Of each row its token.
    pub(super) fn tokens(&self) -> &[i64] {
        &self.tokens
    }

    /// `[tokens, picks]`: of each pair its row, or [`NOWHERE`].
    pub(super) fn places(&self) -> &[u32] {
        &self.places
    }

    /// The run of each expert.
    pub(super) fn iter(&self) -> impl Iterator<Item = Range<usize>> {
        self.starts.windows(2).map(|pair| pair[0]..pair[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_then_by_token() {
        let mut runs = Runs::default();
        for _ in 0..2 {
            // Three tokens, two picks each; experts 4 to 6 are here, 3 and 7 are not, and nothing is at -1.
            runs.sort(&[6, 4, 3, 4, -1, 7], 2, 4, 3);
            assert_eq!(runs.tokens(), [0, 1, 0]);
            assert_eq!(runs.places(), [2, 0, NOWHERE, 1, NOWHERE, NOWHERE]);
            assert_eq!(runs.iter().collect::<Vec<_>>(), [0..2, 2..2, 2..3]);
        }
    }
}
