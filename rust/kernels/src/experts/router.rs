//! Which experts a token goes to, and with what weights. All in `f32`: experts are often nearly equal.

#![expect(
    unsafe_code,
    reason = "reads tensors, and writes what other threads write beside"
)]

use std::{cell::RefCell, sync::Arc};

use crate::{
    element::Element,
    error::LinearError,
    linear::{Linear, Rows, Together},
    pool::share,
    simd::Portable,
};

/// Scores that one thread takes at a time. Fewer in all are left to the caller: waking others costs more.
const SHARE: usize = 2 << 10;

thread_local! {
    /// Kept between calls, for all layers.
    static ROOM: RefCell<Room> = RefCell::new(Room::default());
}

/// What the thread that calls needs beside the tensors.
#[derive(Default)]
struct Room {
    /// `[count, hidden]`
    inputs: Vec<f32>,
    /// `[count, experts]`
    logits: Vec<f32>,
}

/// How experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Experts of a token.
    pub picks: usize,
    /// Whether an expert's score is a sigmoid of its own; else all of them are one softmax.
    pub is_sigmoid: bool,
    /// Groups of equally many experts, of which a token uses some only (DeepSeek-V2, 2024); 1: all are one.
    pub groups: usize,
    /// How many a token uses.
    pub groups_kept: usize,
    /// Whether the weights of a token's experts are made to add up to 1.
    pub is_normalised: bool,
    /// Multiplies the weights after that.
    pub scale: f32,
}

/// The rows of tokens, and where their picks go.
#[derive(Clone, Copy, Debug)]
pub struct Picks<E> {
    /// `[count, hidden]`
    pub input: *const E,
    /// Numbers from one token's to the next one's.
    pub input_stride: usize,
    /// `[count, picks]`, without gaps.
    pub weights: *mut f32,
    /// `[count, picks]`, without gaps: best first.
    pub chosen: *mut i32,
    /// Tokens.
    pub count: usize,
}

/// Chooses experts for tokens.
pub struct Router {
    linear: Arc<Linear<f32>>,
    /// Added to the scores for the choice, not for the weights (DeepSeek-V3, 2024).
    bias: Option<Vec<f32>>,
    choice: Choice,
}

/// What the threads of one call share.
struct Call<'a> {
    router: &'a Router,
    logits: &'a [f32],
    weights: *mut f32,
    chosen: *mut i32,
}

// SAFETY: each thread writes the picks of other tokens.
unsafe impl Sync for Call<'_> {}

impl Router {
    /// A router whose layer has an output for each expert.
    pub fn new(
        linear: Arc<Linear<f32>>,
        bias: Option<Vec<f32>>,
        choice: Choice,
    ) -> Result<Self, LinearError> {
        let experts = linear.shape().0;
        let in_group = experts / choice.groups.max(1);
        let wrong = |field, reason| Err(LinearError::InvalidShape { field, reason });
        if choice.groups == 0 || !experts.is_multiple_of(choice.groups) {
            return wrong("groups", "do not divide the experts");
        }
        if choice.groups_kept == 0 || choice.groups_kept > choice.groups {
            return wrong("groups_kept", "are not some of the groups");
        }
        if choice.picks == 0 || choice.picks > choice.groups_kept * in_group {
            return wrong("picks", "are not some of the experts that may be chosen");
        }
        if choice.groups > 1 && in_group < 2 {
            return wrong("groups", "have no two experts each");
        }
        if bias.as_ref().is_some_and(|bias| bias.len() != experts) {
            return wrong("bias", "is not one number for each expert");
        }
        Ok(Self {
            linear,
            bias,
            choice,
        })
    }

    /// Chooses for some tokens, on up to `threads` threads. Of equal experts it takes the first; one whose score is NaN
    /// comes after all others.
    ///
    /// # Safety
    /// The addresses are of tensors of the shapes that [`Picks`] says, aligned for their numbers. Until the call returns
    /// nobody writes the inputs, and nobody reads or writes the picks.
    pub unsafe fn forward<E: Element>(&self, picks: &Picks<E>, threads: u32) {
        let (experts, hidden) = self.linear.shape();
        let count = picks.count;
        ROOM.with_borrow_mut(|Room { inputs, logits }| {
            logits.resize(count * experts, 0.0);
            // SAFETY: the caller's promise.
            let (input, input_stride) = unsafe { widened(picks, hidden, inputs) };
            let rows = Rows {
                input,
                input_stride,
                output: logits.as_mut_ptr(),
                count,
            };
            // SAFETY: the rows are there, and as many logits.
            unsafe { self.linear.forward(&rows, threads) };
            let call = Call {
                router: self,
                logits,
                weights: picks.weights,
                chosen: picks.chosen,
            };
            let together = (SHARE / experts).max(1);
            let parts = count.div_ceil(together);
            share(parts, threads, Scores::default, |scores, part| {
                for row in part * together..count.min((part + 1) * together) {
                    // SAFETY: the caller's promise, and each token is chosen for once.
                    unsafe { call.choose(row, scores) };
                }
            });
        });
    }
}

/// The inputs as `f32`, and numbers from one token's to the next one's.
///
/// # Safety
/// They are there.
unsafe fn widened<E: Element>(
    picks: &Picks<E>,
    hidden: usize,
    room: &mut Vec<f32>,
) -> (*const f32, usize) {
    if let Some(here) = E::as_floats(picks.input) {
        return (here, picks.input_stride);
    }
    room.resize(picks.count * hidden, 0.0);
    for (row, target) in room.chunks_exact_mut(hidden).enumerate() {
        let from = picks.input.wrapping_add(row * picks.input_stride);
        // SAFETY: the caller's promise, and so many are in a row of the room.
        unsafe { E::copy_floats::<Portable>(from, hidden, target.as_mut_ptr()) };
    }
    (room.as_ptr(), hidden)
}

/// What a thread makes of one token's logits.
#[derive(Default)]
struct Scores {
    /// Of each expert, what weighs it.
    weights: Vec<f32>,
    /// What it is chosen by; minus infinity where it may not be, or is already.
    keys: Vec<f32>,
    /// As much of each group.
    group_keys: Vec<f32>,
}

impl Call<'_> {
    /// Chooses for one token.
    ///
    /// # Safety
    /// There is room for its picks, which no other thread writes.
    unsafe fn choose(&self, row: usize, scores: &mut Scores) {
        let choice = &self.router.choice;
        let experts = self.router.linear.shape().0;
        scores.weigh(&self.logits[row * experts..][..experts], choice.is_sigmoid);
        scores.set_keys(self.router.bias.as_deref());
        if choice.groups > 1 {
            scores.keep_groups(choice, self.router.bias.is_some());
        }
        let first = row * choice.picks;
        let mut sum = 0.0;
        for pick in first..first + choice.picks {
            let expert = take_best(&mut scores.keys);
            sum += scores.weights[expert];
            // SAFETY: the caller's promise.
            unsafe {
                self.chosen.add(pick).write(expert as i32);
                self.weights.add(pick).write(scores.weights[expert]);
            }
        }
        let divisor = if choice.is_normalised { sum } else { 1.0 };
        for pick in first..first + choice.picks {
            // SAFETY: as above; it has just been written.
            unsafe {
                let weight = self.weights.add(pick);
                weight.write(weight.read() / divisor * choice.scale);
            }
        }
    }
}

impl Scores {
    fn weigh(&mut self, logits: &[f32], is_sigmoid: bool) {
        self.weights.clear();
        if is_sigmoid {
            let sigmoid = |logit: &f32| 1.0 / (1.0 + (-logit).exp());
            self.weights.extend(logits.iter().map(sigmoid));
            return;
        }
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers = logits.iter().map(|logit| (logit - largest).exp());
        self.weights.extend(powers);
        let sum: f32 = self.weights.iter().sum();
        for weight in &mut self.weights {
            *weight /= sum;
        }
    }

    fn set_keys(&mut self, bias: Option<&[f32]>) {
        self.keys.clear();
        self.keys.extend_from_slice(&self.weights);
        for (key, bias) in self.keys.iter_mut().zip(bias.unwrap_or_default()) {
            *key += bias;
        }
        for key in &mut self.keys {
            // What is no number is worse than any that is one, but not than what may not be chosen.
            *key = key.max(f32::MIN);
        }
    }

    /// Leaves the experts of the best groups.
    fn keep_groups(&mut self, choice: &Choice, has_bias: bool) {
        let size = self.keys.len() / choice.groups;
        self.group_keys.clear();
        for group in self.keys.chunks_exact(size) {
            let (best, second) = best_two(group);
            // With a bias a group is as good as its two best experts together (V3), without as its best (V2).
            let key = if has_bias { best + second } else { best };
            self.group_keys.push(key.max(f32::MIN));
        }
        for _ in 0..choice.groups_kept {
            take_best(&mut self.group_keys);
        }
        // Those that were taken are the ones to keep.
        for (group, key) in self.keys.chunks_exact_mut(size).zip(&self.group_keys) {
            if *key > f32::NEG_INFINITY {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// The largest of some numbers, and the next.
fn best_two(numbers: &[f32]) -> (f32, f32) {
    let mut best = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for number in numbers.iter().copied() {
        if number > best.0 {
            best = (number, best.0);
        } else if number > best.1 {
            best.1 = number;
        }
    }
    best
}

/// The place of the largest number, of equals the first, which is minus infinity from then on.
fn take_best(keys: &mut [f32]) -> usize {
    let mut best = 0;
    for (place, key) in keys.iter().enumerate() {
        if *key > keys[best] {
            best = place;
        }
    }
    keys[best] = f32::NEG_INFINITY;
    best
}
