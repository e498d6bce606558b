//! Mixtures of experts beside a loop over tokens and picks.

use std::{fmt::Debug, sync::Arc};

use orchestra_kernels::{
    Element, Linear, LinearError, PairLinear, bf16,
    experts::{Choice, Expert, Experts, Picks, Router, Tokens},
    linear::{Rows, Together},
    pairs::Unit,
    rows::{self, Activation, Gate},
};
use proptest::prelude::*;

use super::numbers;

fn narrow<E: Element>(numbers: &[f32]) -> Vec<E> {
    numbers.iter().map(|number| E::narrow(*number)).collect()
}

/// How a layer is made of its outputs, its inputs and its weights.
type Make<L, E> = fn((usize, usize), &[E]) -> L;

fn plain<E: Element>(shape: (usize, usize), weight: &[E]) -> Linear<E> {
    assert_eq!(weight.len(), shape.0 * shape.1);
    // SAFETY: the slice holds as many numbers as the shape says.
    unsafe { Linear::new(shape, weight.as_ptr(), None) }.unwrap()
}

fn in_pairs(shape: (usize, usize), weight: &[u16]) -> PairLinear {
    assert_eq!(weight.len(), shape.0 * shape.1);
    // SAFETY: as above; and only called where there is a unit.
    unsafe { PairLinear::new(Unit::here().unwrap(), shape, weight.as_ptr(), None) }.unwrap()
}

/// Experts of random weights.
fn experts<L: Together>(
    make: Make<L, L::Number>,
    (count, hidden, width): (usize, usize, usize),
    seed: u64,
) -> Vec<Expert<L>> {
    let layer = |seed: u64, shape: (usize, usize)| {
        Arc::new(make(shape, &narrow(&numbers(seed, shape.0 * shape.1))))
    };
    (0..count as u64)
        .map(|at| Expert {
            gate_up: layer(seed ^ (2 * at), (2 * width, hidden)),
            down: layer(seed ^ (2 * at + 1), (hidden, width)),
        })
        .collect()
}

/// A step: what goes in, and where it is sent.
#[derive(Clone, Debug)]
struct Step<E> {
    input: Vec<E>,
    chosen: Vec<i32>,
    weights: Vec<f32>,
    picks: usize,
}

impl<E: Element> Step<E> {
    /// The step of some of the tokens.
    fn part(&self, tokens: std::ops::Range<usize>, hidden: usize) -> Self {
        let of_picks = tokens.start * self.picks..tokens.end * self.picks;
        Self {
            input: self.input[tokens.start * hidden..tokens.end * hidden].to_vec(),
            chosen: self.chosen[of_picks.clone()].to_vec(),
            weights: self.weights[of_picks].to_vec(),
            picks: self.picks,
        }
    }

    fn run<L: Together<Number = E>>(&self, experts: &Experts<L>) -> Vec<E> {
        let mut output = self.input.clone();
        let tokens = Tokens {
            input: self.input.as_ptr(),
            chosen: self.chosen.as_ptr(),
            weights: self.weights.as_ptr(),
            picks: self.picks,
            output: output.as_mut_ptr(),
            count: self.chosen.len() / self.picks,
        };
        // SAFETY: the vectors hold as many numbers as these tokens have.
        unsafe { experts.forward(&tokens, 1) };
        output
    }
}

/// One row by one layer.
fn apply<L: Together>(layer: &L, input: &[L::Number]) -> Vec<L::Number> {
    let (outputs, inputs) = layer.shape();
    assert_eq!(input.len(), inputs);
    let mut output = narrow(&vec![0.0; outputs]);
    let rows = Rows {
        input: input.as_ptr(),
        input_stride: inputs,
        output: output.as_mut_ptr(),
        count: 1,
    };
    // SAFETY: there is one row, and room for what comes out.
    unsafe { L::forward_together(&[(layer, rows)], 1) };
    output
}

/// What one expert makes of one row.
fn alone<L: Together>(expert: &Expert<L>, input: &[L::Number], act: Activation) -> Vec<L::Number> {
    let gates = apply(&*expert.gate_up, input);
    let mut gated = narrow(&vec![0.0; gates.len() / 2]);
    let gate = Gate {
        input: gates.as_ptr(),
        output: gated.as_mut_ptr(),
        count: 1,
        size: gated.len(),
        activation: act,
    };
    // SAFETY: there is one row, and room for what comes out.
    unsafe { rows::gate(&gate, 1) };
    apply(&*expert.down, &gated)
}

/// The same by a loop: to the bit, for each of its parts promises that.
fn by_hand<L: Together>(
    step: &Step<L::Number>,
    first: i32,
    experts: &[Expert<L>],
    hidden: usize,
) -> Vec<L::Number> {
    let mut output = Vec::new();
    for (token, chosen) in step.chosen.chunks(step.picks).enumerate() {
        let mut sums = vec![0.0_f32; hidden];
        for (pick, number) in chosen.iter().enumerate() {
            let own = usize::try_from(number - first).ok();
            let Some(expert) = own.and_then(|own| experts.get(own)) else {
                continue;
            };
            let row = alone(
                expert,
                &step.input[token * hidden..][..hidden],
                Activation::Silu,
            );
            let weight = step.weights[token * step.picks + pick];
            for (sum, number) in sums.iter_mut().zip(row) {
                *sum = number.widen().mul_add(weight, *sum);
            }
        }
        output.extend(narrow::<L::Number>(&sums));
    }
    output
}

fn check<L: Together>(make: Make<L, L::Number>, case: &Case) -> Result<(), TestCaseError>
where
    L::Number: PartialEq + Debug,
{
    let Case {
        tokens,
        picks,
        cut,
        shape,
        first,
        ..
    } = *case;
    let hidden = shape.1;
    let step = Step {
        input: narrow(&numbers(case.seed ^ 5, tokens * hidden)),
        chosen: case.chosen(),
        weights: numbers(case.seed ^ 9, tokens * picks),
        picks,
    };
    let expected = by_hand(
        &step,
        first as i32,
        &experts(make, shape, case.seed),
        hidden,
    );
    let all = Experts::new(first, Activation::Silu, experts(make, shape, case.seed)).unwrap();
    let whole = step.run(&all);
    prop_assert_eq!(&whole, &expected);
    let cut = cut.min(tokens);
    let mut parts = step.part(0..cut, hidden).run(&all);
    parts.extend(step.part(cut..tokens, hidden).run(&all));
    prop_assert_eq!(whole, parts);
    Ok(())
}

#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    picks: usize,
    cut: usize,
    /// Experts, hidden size, width.
    shape: (usize, usize, usize),
    first: usize,
    /// Whether most tokens want the same expert.
    is_crowded: bool,
    seed: u64,
}

impl Case {
    /// Experts for each pick, some of them of other ranks.
    fn chosen(&self) -> Vec<i32> {
        let most = (self.first + self.shape.0 + 2) as f32;
        let draws = numbers(self.seed ^ 3, self.tokens * self.picks);
        let choose = |draw: f32| {
            if self.is_crowded && draw < 0.8 {
                self.first as i32
            } else {
                (draw.abs() * most) as i32
            }
        };
        draws.into_iter().map(choose).collect()
    }
}

fn cases() -> impl Strategy<Value = Case> {
    (
        (1_usize..80, 1_usize..4, 0_usize..80),
        (1_usize..5, 1_usize..70, 1_usize..70),
        (0_usize..3, any::<bool>(), any::<u64>()),
    )
        .prop_map(
            |((tokens, picks, cut), shape, (first, is_crowded, seed))| Case {
                tokens,
                picks,
                cut,
                shape,
                first,
                is_crowded,
                seed,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn experts_give_what_a_loop_gives(case in cases()) {
        check::<Linear<f32>>(plain, &case)?;
        check::<Linear<u16>>(plain, &case)?;
        if Unit::here().is_some() {
            check::<PairLinear>(in_pairs, &case)?;
        }
    }
}

#[test]
fn more_tokens_than_there_is_room_for_are_computed_in_turns() {
    // A token takes 4 * (600 + 3 * 500) * 4 bytes: 2,000 of them the room.
    let (tokens, shape) = (2_100, (3, 600, 500));
    let step = Step {
        input: numbers(1, tokens * 600),
        chosen: (0..tokens as i32 * 4).map(|pick| pick % 5).collect(),
        weights: numbers(2, tokens * 4),
        picks: 4,
    };
    let all = experts::<Linear<f32>>(plain, shape, 3);
    let made = Experts::new(1, Activation::Silu, experts(plain, shape, 3)).unwrap();
    let whole = step.run(&made);
    for token in [0, 1_990, 2_000, tokens - 1] {
        let expected = by_hand(&step.part(token..token + 1, 600), 1, &all, 600);
        assert_eq!(whole[token * 600..][..600], expected, "{token}");
    }
}

#[test]
fn experts_that_do_not_fit_are_refused_by_name() {
    let shaped = |gate_up: (usize, usize), down: (usize, usize)| Expert {
        gate_up: Arc::new(plain(gate_up, &vec![0.0; gate_up.0 * gate_up.1])),
        down: Arc::new(plain(down, &vec![0.0; down.0 * down.1])),
    };
    let field = |experts: Vec<Expert<Linear<f32>>>| match Experts::new(0, Activation::Silu, experts)
    {
        Err(LinearError::InvalidShape { field, .. }) => field,
        Err(LinearError::NoMemory { .. }) => "memory",
        Ok(_) => "none",
    };
    assert_eq!(field(Vec::new()), "experts");
    assert_eq!(field(vec![shaped((6, 4), (4, 2))]), "down");
    assert_eq!(
        field(vec![shaped((4, 4), (4, 2)), shaped((6, 4), (4, 3))]),
        "experts"
    );
    assert_eq!(
        field(vec![shaped((4, 4), (4, 2)), shaped((4, 4), (4, 2))]),
        "none"
    );
}

// === which experts ===

/// The weights and the experts of each token.
fn choose<E: Element>(router: &Router, input: &[E], count: usize, picks: usize) -> Picked {
    let (mut weights, mut chosen) = (vec![0.0; count * picks], vec![-1; count * picks]);
    let stride = input.len() / count;
    let picks = Picks {
        input: input.as_ptr(),
        input_stride: stride,
        weights: weights.as_mut_ptr(),
        chosen: chosen.as_mut_ptr(),
        count,
    };
    // SAFETY: the vectors hold as many numbers as these tokens have.
    unsafe { router.forward(&picks, 1) };
    (weights, chosen)
}

type Picked = (Vec<f32>, Vec<i32>);

/// What weighs each expert, and what it is chosen by: minus infinity where its group is not kept.
fn scores(logits: &[f64], bias: Option<&[f32]>, choice: &Choice) -> (Vec<f64>, Vec<f64>) {
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    let score = |logit: &f64| {
        if choice.is_sigmoid {
            1.0 / (1.0 + (-logit).exp())
        } else {
            logit.exp() / sum
        }
    };
    let weights: Vec<f64> = logits.iter().map(score).collect();
    let mut keys = weights.clone();
    for (key, bias) in keys.iter_mut().zip(bias.unwrap_or_default()) {
        *key += f64::from(*bias);
    }
    let size = keys.len() / choice.groups;
    let worth = |group: &[f64]| {
        let mut sorted = group.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[0] + bias.map_or(0.0, |_| sorted.get(1).copied().unwrap_or_default())
    };
    let mut groups: Vec<(usize, f64)> = keys.chunks(size).map(worth).enumerate().collect();
    groups.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (group, _) in &groups[choice.groups_kept..] {
        keys[group * size..(group + 1) * size].fill(f64::NEG_INFINITY);
    }
    (weights, keys)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_best_are_chosen_and_weighed(
        (groups, in_group, kept) in (1_usize..5, 2_usize..7).prop_flat_map(|(g, i)| (Just(g), Just(i), 1..=g)),
        picks in 1_usize..7,
        count in 1_usize..40,
        hidden in 1_usize..40,
        (is_sigmoid, is_normalised, has_bias) in any::<(bool, bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let experts = groups * in_group;
        let picks = picks.min(kept * in_group);
        let choice = Choice { picks, is_sigmoid, groups, groups_kept: kept, is_normalised, scale: 1.5 };
        let weight = numbers(seed, experts * hidden);
        let bias = has_bias.then(|| numbers(!seed, experts));
        let router = Router::new(Arc::new(plain((experts, hidden), &weight)), bias.clone(), choice).unwrap();
        let input: Vec<u16> = narrow(&numbers(seed ^ 7, count * hidden));
        let (weights, chosen) = choose(&router, &input, count, picks);
        let wide: Vec<f32> = input.iter().copied().map(bf16::widen).collect();
        prop_assert_eq!(&(weights.clone(), chosen.clone()), &choose(&router, &wide, count, picks));
        for row in 0..count {
            let x = &wide[row * hidden..][..hidden];
            let product = |w: &[f32]| w.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let logits: Vec<f64> = weight.chunks(hidden).map(product).collect();
            let (expected, keys) = scores(&logits, bias.as_deref(), &choice);
            let own: Vec<usize> = chosen[row * picks..][..picks].iter().map(|it| *it as usize).collect();
            let sum: f64 = own.iter().map(|expert| expected[*expert]).sum();
            let divisor = if is_normalised { sum } else { 1.0 };
            for (pick, expert) in own.iter().enumerate() {
                let got = f64::from(weights[row * picks + pick]);
                prop_assert!((got - expected[*expert] / divisor * 1.5).abs() < 1e-4);
                // Nothing that comes later, or not at all, is better.
                let rest = (0..experts).filter(|other| !own[..=pick].contains(other));
                for other in rest {
                    prop_assert!(keys[*expert] > keys[other] - 1e-5, "{own:?} {keys:?}");
                }
            }
        }
        let half = count / 2;
        if half > 0 {
            let first = choose(&router, &input[..half * hidden], half, picks);
            prop_assert_eq!(&first.0, &weights[..half * picks]);
            prop_assert_eq!(&first.1, &chosen[..half * picks]);
        }
    }
}

#[test]
fn experts_differ_whatever_the_scores_are() {
    let choice = Choice {
        picks: 3,
        is_sigmoid: false,
        groups: 1,
        groups_kept: 1,
        is_normalised: true,
        scale: 1.0,
    };
    let router = |weight: &[f32], choice| {
        Router::new(Arc::new(plain((weight.len(), 1), weight)), None, choice)
    };
    let made = router(&[1.0, 2.0, 2.0, 0.5], choice).unwrap();
    // Of equals the first; and a token of which nothing is a number goes somewhere all the same.
    assert_eq!(choose(&made, &[1.0_f32], 1, 3).1, [1, 2, 0]);
    assert_eq!(choose(&made, &[f32::NAN], 1, 3).1, [0, 1, 2]);
    assert_eq!(choose(&made, &[f32::INFINITY], 1, 3).1, [0, 1, 2]);
}

#[test]
fn choices_that_cannot_be_made_are_refused_by_name() {
    let choice = Choice {
        picks: 2,
        is_sigmoid: true,
        groups: 2,
        groups_kept: 1,
        is_normalised: false,
        scale: 1.0,
    };
    let field = |bias: usize, choice: Choice| {
        let linear = Arc::new(plain((4, 1), &[0.0; 4]));
        match Router::new(linear, Some(vec![0.0; bias]), choice) {
            Err(LinearError::InvalidShape { field, .. }) => field,
            Err(LinearError::NoMemory { .. }) => "memory",
            Ok(_) => "none",
        }
    };
    assert_eq!(field(4, choice), "none");
    assert_eq!(field(3, choice), "bias");
    assert_eq!(field(4, Choice { picks: 3, ..choice }), "picks");
    assert_eq!(field(4, Choice { picks: 0, ..choice }), "picks");
    let grouped = |groups, groups_kept| Choice {
        groups,
        groups_kept,
        ..choice
    };
    assert_eq!(field(4, grouped(3, 1)), "groups");
    assert_eq!(field(4, grouped(0, 0)), "groups");
    assert_eq!(field(4, grouped(4, 4)), "groups");
    assert_eq!(field(4, grouped(2, 3)), "groups_kept");
}
