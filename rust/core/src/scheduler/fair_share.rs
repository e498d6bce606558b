//! Which tenant is next: virtual token counters.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Every tenant has a counter of the
//! service that it got, weighted; of those that wait, the one with the smallest counter is next. A tenant that starts
//! to wait is lifted to the smallest counter among those that wait, so that nobody saves up service by staying away;
//! where nobody waits, to the counter of the one that left last. What newcomers are lifted to never sinks, also where a
//! refund lowers the smallest counter: a refund is for the one who was charged too much.
//!
//! *Gap.* Let `U` be the largest single charge. Without refunds, only the smallest counter is charged and nobody starts
//! below it, so all counters that wait stay within `U` of the smallest. Two tenants that wait all the while from one
//! moment to another thus get services that differ by at most `2U` between them, whatever the others do. A request that
//! is served because it is overdue, or ahead of one that finds no room, is charged like any other, but its tenant was
//! not the one with the smallest counter; the bound holds between such grants.

use std::{collections::BTreeSet, sync::Arc};

use rustc_hash::FxHashMap;

/// A tenant's place among those that wait.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    counter: u64,
    /// Equals take turns: whoever was charged goes behind those of the same counter.
    number: u64,
    tenant: Arc<str>,
}

#[derive(Clone, Copy, Debug)]
struct Account {
    counter: u64,
    /// The number of its turn, while it waits.
    turn: Option<u64>,
}

/// The counters of one class of one queue.
#[derive(Debug, Default)]
pub(super) struct FairShare {
    accounts: FxHashMap<Arc<str>, Account>,
    waiting: BTreeSet<Turn>,
    /// Those that do not wait and whose counter is above what they would be lifted to.
    idle: BTreeSet<(u64, Arc<str>)>,
    /// What a tenant is lifted to that starts to wait: the most that the smallest counter has been.
    floor: u64,
    num_turns: u64,
}

impl FairShare {
    /// Tenants that wait.
    pub(super) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Those that wait, next one first.
    pub(super) fn order(&self) -> impl Iterator<Item = &Arc<str>> {
        self.waiting.iter().map(|turn| &turn.tenant)
    }

    fn raise_floor(&mut self) {
        let least = self.waiting.first().map_or(0, |turn| turn.counter);
        self.floor = self.floor.max(least);
    }

    fn next_turn(&mut self) -> u64 {
        self.num_turns += 1;
        self.num_turns
    }

    /// The tenant waits from now on.
    pub(super) fn join(&mut self, tenant: &Arc<str>) {
        self.raise_floor();
        let (floor, number) = (self.floor, self.next_turn());
        let new = Account {
            counter: 0,
            turn: None,
        };
        let account = self.accounts.entry(Arc::clone(tenant)).or_insert(new);
        if account.turn.is_some() {
            return;
        }
        self.idle.remove(&(account.counter, Arc::clone(tenant)));
        account.counter = account.counter.max(floor);
        account.turn = Some(number);
        self.waiting.insert(Turn {
            counter: account.counter,
            number,
            tenant: Arc::clone(tenant),
        });
    }

    /// The tenant waits no longer. At most `max_num_idle` such tenants are remembered; of more, those with the least
    /// to lose are forgotten.
    pub(super) fn leave(&mut self, tenant: &Arc<str>, max_num_idle: usize) {
        let Some(account) = self.accounts.get_mut(tenant) else {
            return;
        };
        let Some(number) = account.turn.take() else {
            return;
        };
        let counter = account.counter;
        self.waiting.remove(&Turn {
            counter,
            number,
            tenant: Arc::clone(tenant),
        });
        self.idle.insert((counter, Arc::clone(tenant)));
        if self.waiting.is_empty() {
            self.floor = self.floor.max(counter);
        }
        self.raise_floor();
        // Those who would be lifted as high as they are, and those who are too many.
        while let Some((counter, _)) = self.idle.first()
            && (*counter <= self.floor || self.idle.len() > max_num_idle)
            && let Some((_, tenant)) = self.idle.pop_first()
        {
            self.accounts.remove(&tenant);
        }
    }

    /// The tenant, which waits, got service.
    pub(super) fn charge(&mut self, tenant: &Arc<str>, amount: u64) {
        let number = self.next_turn();
        self.change(
            tenant,
            |counter| counter.saturating_add(amount),
            Some(number),
        );
        self.raise_floor();
    }

    /// The tenant used less than it was charged. Without effect where it is forgotten.
    pub(super) fn refund(&mut self, tenant: &Arc<str>, amount: u64) {
        self.change(tenant, |counter| counter.saturating_sub(amount), None);
    }

    fn change(&mut self, tenant: &Arc<str>, to: impl Fn(u64) -> u64, turn: Option<u64>) {
        let Some(account) = self.accounts.get_mut(tenant) else {
            return;
        };
        let before = account.counter;
        account.counter = to(before);
        let counter = account.counter;
        if let Some(number) = account.turn {
            let new_number = turn.unwrap_or(number);
            account.turn = Some(new_number);
            let mut place = Turn {
                counter: before,
                number,
                tenant: Arc::clone(tenant),
            };
            self.waiting.remove(&place);
            (place.counter, place.number) = (counter, new_number);
            self.waiting.insert(place);
        } else {
            self.idle.remove(&(before, Arc::clone(tenant)));
            self.idle.insert((counter, Arc::clone(tenant)));
        }
    }

    /// # Panics
    /// If accounts and orders do not agree, or too many are remembered.
    pub(super) fn check_integrity(&self, max_num_idle: usize) {
        assert_eq!(self.accounts.len(), self.waiting.len() + self.idle.len());
        assert!(self.idle.len() <= max_num_idle, "too many idle tenants");
        for (tenant, account) in &self.accounts {
            let (counter, tenant) = (account.counter, Arc::clone(tenant));
            let is_known = match account.turn {
                Some(number) => self.waiting.contains(&Turn {
                    counter,
                    number,
                    tenant,
                }),
                None => self.idle.contains(&(counter, tenant)),
            };
            assert!(is_known, "a tenant has no place");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(tenant: &str) -> Arc<str> {
        tenant.into()
    }

    fn order(share: &FairShare) -> Vec<&str> {
        share.order().map(|tenant| &**tenant).collect()
    }

    #[test]
    fn the_least_served_is_next_and_equals_take_turns() {
        let mut share = FairShare::default();
        for tenant in ["b", "a"] {
            share.join(&name(tenant));
        }
        assert_eq!(order(&share), ["b", "a"], "who came first");
        share.charge(&name("b"), 10);
        assert_eq!(order(&share), ["a", "b"]);
        share.charge(&name("a"), 10);
        assert_eq!(order(&share), ["b", "a"], "charged last, so behind");
        share.charge(&name("b"), 10);
        share.refund(&name("b"), 15);
        assert_eq!(order(&share), ["b", "a"], "it used less");
        share.check_integrity(8);
    }

    #[test]
    fn staying_away_saves_nothing_up() {
        let mut share = FairShare::default();
        share.join(&name("busy"));
        share.charge(&name("busy"), 100);
        share.join(&name("late"));
        share.charge(&name("late"), 1);
        assert_eq!(order(&share), ["busy", "late"], "lifted to 100");

        // Nor does it where nobody waits: the last one to leave sets the mark.
        share.leave(&name("late"), 8);
        share.leave(&name("busy"), 8);
        share.join(&name("later"));
        share.join(&name("busy"));
        assert_eq!(order(&share), ["later", "busy"]);
        share.charge(&name("later"), 1);
        assert_eq!(order(&share), ["busy", "later"]);
    }

    #[test]
    fn what_a_tenant_owes_outlasts_its_absence_as_long_as_it_is_remembered() {
        let mut share = FairShare::default();
        share.join(&name("stays"));
        for (tenant, amount) in [("x", 5), ("y", 10), ("z", 15)] {
            share.join(&name(tenant));
            share.charge(&name(tenant), amount);
            share.leave(&name(tenant), 2);
            share.check_integrity(2);
        }
        for tenant in ["z", "y", "x"] {
            share.join(&name(tenant));
        }
        assert_eq!(
            order(&share),
            ["stays", "x", "y", "z"],
            "x was forgotten, and starts afresh"
        );
        share.charge(&name("stays"), 9);
        assert_eq!(order(&share), ["x", "stays", "y", "z"]);
    }
}
