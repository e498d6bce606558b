//! One queue of requests that wait for a worker, and whose turn it is.
//!
//! Three orders, one inside the other:
//!
//! 1. *Classes* share the grants by weight, as in self-clocked fair queueing (Golestani, 1994): a class that would be
//!    furthest behind after one more grant, of one over its weight, is next; one that starts to wait starts where the
//!    last grant was. Between two grants of a class `c` that waits all the while, and before its first one, another
//!    class `d` gets at most `⌊weight(d) / weight(c)⌋ + 1`: as many of its steps fit into one of `c`.
//! 2. *Tenants* of a class go by what they were served: [`FairShare`].
//! 3. *Requests* of a tenant go by least prefill left, aged by arrivals, as in the step scheduler. Number `a` of the
//!    tenant, with `b` steps of 256 tokens to compute, ranks at `a + min(b, max_tenant_overtakes + 1)`. One whose next
//!    block to compute is that of a waiting request goes right behind that one, as far as its rank stays between `a`
//!    and what it was; the order's proof needs no more than that, so this costs nobody more than the bound.
//!
//! *Starvation.* Above all three: let `d` be the requests that left the queue and `a` those that came before the oldest
//! one that waits. All of these `a` have left, so `d - a` have left that came later than the oldest. Of two that wait
//! the older has been overtaken at least as often. So whenever `d - a` has reached `max_overtakes` the oldest is next,
//! and no request is overtaken by more than that, whoever asks and for whatever, except where it finds no room
//! ([`waiting`](super::waiting) adds the bound for that). Requests that are cancelled count as if they had been
//! served: that keeps the count exact in O(1) and errs on the side of the one that waits.

use std::{
    collections::{BTreeMap, btree_map::Values},
    sync::Arc,
};

use rustc_hash::FxHashMap;

use super::{
    admission::{AdmissionClass, Rules},
    fair_share::FairShare,
};
use crate::hash::BlockHash;

/// Prefill is compared in steps of so many tokens.
const PREFILL_STEP_TOKENS: u64 = 256;
/// So many of one tenant are looked at before the next tenant's.
const TENANT_LOOKAHEAD: usize = 4;

/// What decides when a request's turn comes.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) tenant: Arc<str>,
    pub(super) class: AdmissionClass,
    /// Prompt tokens to compute.
    pub(super) num_prefill_tokens: u64,
    /// The first block to compute, where it is a whole one.
    pub(super) next_block: Option<BlockHash>,
}

/// A place among the tenant's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    rank: u64,
    /// The number of the one that it follows, or its own.
    leader: u64,
    number: u64,
}

/// The waiting requests of a tenant that have the same block to compute next.
#[derive(Clone, Copy, Debug)]
struct Siblings {
    first: Place,
    count: u32,
}

/// A tenant's requests; the values are their arrivals.
#[derive(Debug, Default)]
struct TenantQueue {
    places: BTreeMap<Place, u64>,
    siblings: FxHashMap<BlockHash, Siblings>,
    num_arrivals: u64,
}

impl TenantQueue {
    fn push(&mut self, claim: &Claim, arrival: u64, max_overtakes: u64) -> Place {
        let number = self.num_arrivals;
        self.num_arrivals += 1;
        let steps = claim.num_prefill_tokens.saturating_sub(1) / PREFILL_STEP_TOKENS;
        let mut place = Place {
            rank: number + steps.min(max_overtakes + 1),
            leader: number,
            number,
        };
        if let Some(block) = claim.next_block {
            let siblings = self.siblings.entry(block).or_insert(Siblings {
                first: place,
                count: 0,
            });
            siblings.count += 1;
            if (number..=place.rank).contains(&siblings.first.rank) {
                place.rank = siblings.first.rank;
                place.leader = siblings.first.leader;
            } else if siblings.first.rank < number {
                place.rank = number;
            }
            siblings.first = siblings.first.min(place);
        }
        self.places.insert(place, arrival);
        place
    }

    fn remove(&mut self, place: Place, next_block: Option<BlockHash>) {
        self.places.remove(&place);
        if let Some(block) = next_block
            && let Some(siblings) = self.siblings.get_mut(&block)
        {
            siblings.count -= 1;
            if siblings.count == 0 {
                self.siblings.remove(&block);
            }
        }
    }
}

#[derive(Debug, Default)]
struct ClassQueue {
    share: FairShare,
    tenants: FxHashMap<Arc<str>, TenantQueue>,
    num_waiting: usize,
    /// How far the class has come.
    pass: u64,
}

impl ClassQueue {
    /// Arrivals in the order of their turns; of each tenant the first few.
    fn in_order(&self) -> impl Iterator<Item = u64> {
        let tenants = self.share.order();
        tenants.flat_map(|tenant| self.places_of(tenant).take(TENANT_LOOKAHEAD).copied())
    }

    fn places_of(&self, tenant: &Arc<str>) -> Values<'_, Place, u64> {
        static NONE: BTreeMap<Place, u64> = BTreeMap::new();
        let places = self
            .tenants
            .get(tenant)
            .map_or(&NONE, |queue| &queue.places);
        places.values()
    }
}

#[derive(Debug)]
struct Entry<T> {
    claim: Claim,
    place: Place,
    item: T,
}

/// The queue. Requests are known by their arrival, which counts up.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    rules: Rules,
    entries: BTreeMap<u64, Entry<T>>,
    classes: [ClassQueue; 3],
    num_arrivals: u64,
    /// How far the grants have come: where a class starts that did not wait.
    pass_floor: u64,
}

impl<T> FairQueue<T> {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            entries: BTreeMap::new(),
            classes: Default::default(),
            num_arrivals: 0,
            pass_floor: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, arrival: u64) -> Option<&T> {
        self.entries.get(&arrival).map(|entry| &entry.item)
    }

    /// The one that waits longest.
    pub(super) fn oldest(&self) -> Option<&T> {
        self.entries.first_key_value().map(|(_, entry)| &entry.item)
    }

    /// Queues a request; returns its arrival.
    pub(super) fn push(&mut self, claim: Claim, item: T) -> u64 {
        let arrival = self.num_arrivals;
        self.num_arrivals += 1;
        let class = &mut self.classes[claim.class as usize];
        if class.num_waiting == 0 {
            class.pass = class.pass.max(self.pass_floor);
        }
        class.num_waiting += 1;
        class.share.join(&claim.tenant);
        let tenant = class.tenants.entry(Arc::clone(&claim.tenant)).or_default();
        let place = tenant.push(&claim, arrival, self.rules.max_tenant_overtakes);
        self.entries.insert(arrival, Entry { claim, place, item });
        arrival
    }

    /// Where the class would be after one more grant.
    fn next_pass(&self, class: AdmissionClass) -> u64 {
        self.classes[class as usize].pass + self.rules.stride(class)
    }

    /// Takes out a request that got what it waited for, and charges its tenant.
    pub(super) fn serve(&mut self, arrival: u64, charge: u64) -> Option<T> {
        let entry = self.entries.get(&arrival)?;
        let class = entry.claim.class;
        let pass = self.next_pass(class);
        // Less than its own pass where its turn has not come yet.
        let waiting = |&it: &AdmissionClass| self.classes[it as usize].num_waiting > 0;
        let waiting = AdmissionClass::ALL.into_iter().filter(waiting);
        let least = waiting.map(|it| self.next_pass(it)).min();
        self.pass_floor = self.pass_floor.max(least.unwrap_or(pass));
        let queue = &mut self.classes[class as usize];
        queue.pass = pass;
        queue.share.charge(&entry.claim.tenant, charge);
        self.remove(arrival)
    }

    /// Takes out a request.
    pub(super) fn remove(&mut self, arrival: u64) -> Option<T> {
        let entry = self.entries.remove(&arrival)?;
        let class = &mut self.classes[entry.claim.class as usize];
        class.num_waiting -= 1;
        let tenant = &entry.claim.tenant;
        if let Some(queue) = class.tenants.get_mut(tenant) {
            queue.remove(entry.place, entry.claim.next_block);
            if queue.places.is_empty() {
                class.tenants.remove(tenant);
                class.share.leave(tenant, self.rules.max_num_tenants);
            }
        }
        Some(entry.item)
    }

    /// Charges a tenant for service without a wait.
    pub(super) fn charge_unqueued(
        &mut self,
        tenant: &Arc<str>,
        class: AdmissionClass,
        charge: u64,
    ) {
        let class = &mut self.classes[class as usize];
        let is_waiting = class.tenants.contains_key(tenant);
        class.share.join(tenant);
        class.share.charge(tenant, charge);
        if !is_waiting {
            class.share.leave(tenant, self.rules.max_num_tenants);
        }
    }

    /// Gives a tenant back what it was charged and did not use.
    pub(super) fn refund(&mut self, tenant: &Arc<str>, class: AdmissionClass, amount: u64) {
        let share = &mut self.classes[class as usize].share;
        share.refund(tenant, amount);
    }

    /// By age, those that were overtaken as often as may be, and how often. How often `n` older ones that still wait
    /// let a request be overtaken: those `n` have not left, so `n` more of those that have came later.
    pub(super) fn overdue(&self) -> impl Iterator<Item = (u64, u64)> {
        let num_left = self.num_arrivals - self.entries.len() as u64;
        let with_overtakes = (0..).zip(self.entries.keys());
        with_overtakes
            .map(move |(num_older, &arrival)| (arrival, num_left + num_older - arrival))
            .take_while(|&(_, overtakes)| overtakes >= self.rules.max_overtakes)
    }

    /// Arrivals in the order of their turns, overdue ones apart; of each tenant the first few.
    pub(super) fn in_order(&self) -> impl Iterator<Item = u64> {
        let mut classes = AdmissionClass::ALL.map(|class| (self.next_pass(class), class));
        classes.sort_unstable();
        let queues = classes
            .into_iter()
            .map(|(_, class)| &self.classes[class as usize]);
        queues.flat_map(ClassQueue::in_order)
    }

    /// The next of a class.
    pub(super) fn first_of(&self, class: AdmissionClass) -> Option<u64> {
        self.classes[class as usize].in_order().next()
    }

    /// An estimate of how many grants it takes until a request that came now would have its turn, its own included:
    /// tenants alike, classes by weight, never more than all that wait.
    pub(super) fn position(&self, tenant: &str, class: AdmissionClass) -> u64 {
        let queue = &self.classes[class as usize];
        let own = queue.tenants.get(tenant).map(|queue| queue.places.len());
        let num_tenants = queue.share.num_waiting() + usize::from(own.is_none());
        let before = (own.unwrap_or(0) + 1).saturating_mul(num_tenants);
        let in_class = before.min(queue.num_waiting + 1) as u64;
        let weight = self.rules.weight(class);
        let is_served = |&other: &AdmissionClass| {
            other == class || self.classes[other as usize].num_waiting > 0
        };
        let served = AdmissionClass::ALL.into_iter().filter(is_served);
        let weights: u64 = served.map(|other| self.rules.weight(other)).sum();
        let position = in_class.saturating_mul(weights).div_ceil(weight);
        position.min(self.entries.len() as u64 + 1)
    }

    /// # Panics
    /// If the orders do not hold the entries, each once.
    pub(super) fn check_integrity(&self) {
        for class in &self.classes {
            class.share.check_integrity(self.rules.max_num_tenants);
            assert_eq!(class.share.num_waiting(), class.tenants.len());
            let lengths = class.tenants.values().map(|tenant| tenant.places.len());
            assert_eq!(lengths.sum::<usize>(), class.num_waiting);
        }
        let lengths = self.classes.iter().map(|class| class.num_waiting);
        assert_eq!(lengths.sum::<usize>(), self.entries.len());
        for (arrival, entry) in &self.entries {
            let class = &self.classes[entry.claim.class as usize];
            let tenant = class.tenants.get(&entry.claim.tenant);
            let place = tenant.and_then(|tenant| tenant.places.get(&entry.place));
            assert_eq!(place, Some(arrival), "a request has no place");
        }
    }
}
