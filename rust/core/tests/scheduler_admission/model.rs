//! The order of one queue, told naively: every turn looks at everybody who waits.

use std::collections::BTreeMap;

use orchestra_core::{
    Time,
    scheduler::{AdmissionClass, TicketId},
};

/// What the order depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_overtakes: u64,
    pub(crate) max_tenant_overtakes: u64,
    pub(crate) class_weights: [u64; 3],
}

/// A request that waits.
#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub(crate) ticket: TicketId,
    pub(crate) tenant: usize,
    pub(crate) class: AdmissionClass,
    pub(crate) charge: u64,
    pub(crate) deadline: Option<Time>,
    /// Which others have the same first block.
    pub(crate) family: Option<u32>,
    arrival: u64,
    /// Rank, number of the one that it follows, own number.
    place: (u64, u64, u64),
}

type Key = (AdmissionClass, usize);

/// The queue.
pub(crate) struct Model {
    limits: Limits,
    pub(crate) waiting: Vec<Waiter>,
    num_arrivals: u64,
    num_left: u64,
    passes: [u64; 3],
    pass_floor: u64,
    /// Counter, and when it last changed place.
    counters: BTreeMap<Key, (u64, u64)>,
    floors: [u64; 3],
    num_turns: u64,
    /// Of tenants that have a request waiting.
    num_of_tenant: BTreeMap<Key, u64>,
    /// Least place among those who came while somebody of the family waited.
    families: BTreeMap<(Key, u32), (u64, u64, u64)>,
}

impl Model {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: Vec::new(),
            num_arrivals: 0,
            num_left: 0,
            passes: [0; 3],
            pass_floor: 0,
            counters: BTreeMap::new(),
            floors: [0; 3],
            num_turns: 0,
            num_of_tenant: BTreeMap::new(),
            families: BTreeMap::new(),
        }
    }

    fn waits(&self, key: Key) -> bool {
        let mut waiting = self.waiting.iter();
        waiting.any(|waiter| (waiter.class, waiter.tenant) == key)
    }

    /// Where the class would be after one more grant.
    fn next_pass(&self, class: AdmissionClass) -> u64 {
        let weights: u64 = self.limits.class_weights.iter().product();
        self.passes[class as usize] + weights / self.limits.class_weights[class as usize]
    }

    /// What newcomers are lifted to is the most that the smallest counter has been.
    fn raise_floor(&mut self, class: AdmissionClass) {
        let waiting = self.waiting.iter().filter(|it| it.class == class);
        let counters = waiting.map(|it| self.counters[&(class, it.tenant)].0);
        let floor = &mut self.floors[class as usize];
        *floor = counters.min().unwrap_or(0).max(*floor);
    }

    fn join(&mut self, key: Key) {
        self.raise_floor(key.0);
        self.num_turns += 1;
        let turn = self.num_turns;
        let counter = self.counters.entry(key).or_default();
        *counter = (counter.0.max(self.floors[key.0 as usize]), turn);
    }

    fn charge(&mut self, key: Key, amount: u64) {
        self.num_turns += 1;
        let turn = self.num_turns;
        let counter = self.counters.entry(key).or_default();
        *counter = (counter.0 + amount, turn);
        self.raise_floor(key.0);
    }

    pub(crate) fn refund(&mut self, key: Key, amount: u64) {
        if let Some(counter) = self.counters.get_mut(&key) {
            counter.0 -= amount;
        }
    }

    /// A request was served that had nobody before it.
    pub(crate) fn serve_unqueued(&mut self, tenant: usize, class: AdmissionClass, charge: u64) {
        let key = (class, tenant);
        self.join(key);
        self.charge(key, charge);
        let floor = &mut self.floors[class as usize];
        *floor = self.counters[&key].0.max(*floor);
    }

    pub(crate) fn push(
        &mut self,
        ticket: TicketId,
        (tenant, class): (usize, AdmissionClass),
        (prefill, charge): (u64, u64),
        family: Option<u32>,
        deadline: Option<Time>,
    ) {
        let key = (class, tenant);
        if !self.waiting.iter().any(|it| it.class == class) {
            let pass = &mut self.passes[class as usize];
            *pass = self.pass_floor.max(*pass);
        }
        if !self.waits(key) {
            self.join(key);
            self.num_of_tenant.insert(key, 0);
            self.families.retain(|&(of, _), _| of != key);
        }
        let number = self.num_of_tenant[&key];
        *self.num_of_tenant.entry(key).or_default() += 1;
        let rank = number + ((prefill - 1) / 256).min(self.limits.max_tenant_overtakes + 1);
        let mut place = (rank, number, number);
        if let Some(prefix) = family {
            let same = |it: &Waiter| (it.class, it.tenant) == key && it.family == family;
            if !self.waiting.iter().any(same) {
                self.families.remove(&(key, prefix));
            }
            let first = self.families.entry((key, prefix)).or_insert(place);
            if first.0 < number {
                place.0 = number;
            } else if first.0 <= rank {
                (place.0, place.1) = (first.0, first.1);
            }
            *first = place.min(*first);
        }
        self.waiting.push(Waiter {
            ticket,
            tenant,
            class,
            charge,
            deadline,
            family,
            arrival: self.num_arrivals,
            place,
        });
        self.num_arrivals += 1;
    }

    /// Takes out a request without serving it.
    pub(crate) fn remove(&mut self, ticket: TicketId) -> Waiter {
        let index = self.waiting.iter().position(|it| it.ticket == ticket);
        let gone = self.waiting.remove(index.unwrap());
        self.num_left += 1;
        let class = gone.class;
        if !self.waiting.iter().any(|it| it.class == class) {
            let counter = self.counters[&(class, gone.tenant)].0;
            let floor = &mut self.floors[class as usize];
            *floor = counter.max(*floor);
        }
        self.raise_floor(class);
        gone
    }

    /// Serves the one whose turn it is.
    pub(crate) fn serve(&mut self) -> Option<Waiter> {
        let oldest = self.waiting.iter().min_by_key(|it| it.arrival)?;
        let in_order = self.waiting.iter().min_by_key(|it| {
            let class = (self.next_pass(it.class), it.class);
            (class, self.counters[&(it.class, it.tenant)], it.place)
        })?;
        let is_overdue = self.num_left - oldest.arrival >= self.limits.max_overtakes;
        let next = if is_overdue { oldest } else { in_order }.clone();
        let passes = self.waiting.iter().map(|it| self.next_pass(it.class));
        self.pass_floor = passes.min().unwrap().max(self.pass_floor);
        self.passes[next.class as usize] = self.next_pass(next.class);
        self.charge((next.class, next.tenant), next.charge);
        Some(self.remove(next.ticket))
    }
}
