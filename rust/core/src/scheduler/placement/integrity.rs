//! The invariants of placement.

use rustc_hash::FxHashMap;

use super::{super::place::PlacementId, GpuPool};

impl GpuPool {
    /// Asserts that the pieces on the GPUs are those of the placements, that none overlap, that no gang spans
    /// domains, and that the index says what the memory says.
    pub(in super::super) fn check_integrity(&self) {
        let mut slots: FxHashMap<PlacementId, Vec<u32>> = FxHashMap::default();
        for (slot, gpu) in self.gpus.iter().enumerate() {
            let Some(gpu) = gpu else { continue };
            let mut stop = 0;
            for piece in gpu.memory.pieces() {
                assert!(piece.length > 0 && piece.offset >= stop, "pieces overlap");
                stop = piece.stop();
                let held = self.held.get(&piece.placement);
                assert_eq!(held.map(|held| held.priority), Some(piece.priority));
                slots.entry(piece.placement).or_default().push(slot as u32);
            }
            assert!(
                stop <= gpu.memory.capacity(),
                "a piece ends behind the memory"
            );
            assert!(
                !gpu.is_failed || gpu.memory.num_pieces() == 0,
                "a failed GPU is in use"
            );
        }
        for (&id, held) in &self.held {
            let mut on = slots.remove(&id).unwrap_or_default();
            on.sort_unstable();
            on.dedup();
            let mut expected = held.slots.clone();
            expected.sort_unstable();
            assert_eq!(on, expected, "a placement and its GPUs disagree");
            for stage in held.slots.chunks(held.num_gpus as usize) {
                let mut domains = stage.iter().map(|&slot| self.domain_of(slot));
                let first = domains.next();
                assert!(domains.all(|d| Some(d) == first), "a stage spans domains");
            }
            if let Some(at) = held.expires_at {
                assert!(self.expiries.contains(&(at, id)));
            }
        }
        assert!(slots.is_empty(), "a piece outlived its placement");
        let expiring = self.held.values().filter(|held| held.expires_at.is_some());
        assert_eq!(expiring.count(), self.expiries.len());
        self.check_registry();
        self.check_shares();
        self.check_index();
    }

    fn domain_of(&self, slot: u32) -> Option<u32> {
        self.gpus[slot as usize].as_ref().map(|gpu| gpu.domain)
    }

    /// What is booked on nodes and domains is what the placements hold.
    fn check_shares(&self) {
        let mut nodes: FxHashMap<u32, [u128; 3]> = FxHashMap::default();
        let mut domains: FxHashMap<u32, u128> = FxHashMap::default();
        let shares = self.held.values().flat_map(|held| {
            let slots = held.slots.iter();
            slots.map(|&slot| (slot, held.shares))
        });
        for (slot, shares) in shares {
            let Some(gpu) = self.gpus[slot as usize].as_ref() else {
                continue;
            };
            let sums = nodes.entry(gpu.node).or_default();
            for (sum, share) in sums.iter_mut().zip(shares.of_node()) {
                *sum += u128::from(share);
            }
            *domains.entry(gpu.domain).or_default() += u128::from(shares.power_watts);
        }
        for (slot, node) in (0..).zip(&self.nodes) {
            let Some(node) = node else { continue };
            let sums = nodes.remove(&slot).unwrap_or_default();
            assert_eq!(
                node.quotas.map(|quota| quota.held),
                sums,
                "shares of a node"
            );
            let gpus = self.gpus.iter().flatten().filter(|gpu| gpu.node == slot);
            assert_eq!(gpus.count(), node.num_gpus as usize);
            assert_eq!(self.node_names.get(&node.name), Some(&slot));
        }
        for (slot, domain) in (0..).zip(&self.domains) {
            let sum = domains.remove(&slot).unwrap_or_default();
            let held = domain.as_ref().map_or(0, |domain| domain.power.held);
            assert_eq!(held, sum, "power of a domain");
        }
    }

    fn check_registry(&self) {
        assert_eq!(self.gpu_ids.len(), self.gpus.iter().flatten().count());
        assert_eq!(self.gpu_ids.len(), self.gpu_names.len());
        assert_eq!(
            self.gpu_ids.len() + self.free_gpu_slots.len(),
            self.gpus.len()
        );
        assert_eq!(
            self.domain_names.len() + self.free_domain_slots.len(),
            self.domains.len()
        );
        let mut num_members = 0;
        for (index, domain) in self.domains.iter().enumerate() {
            let Some(domain) = domain else { continue };
            assert_eq!(self.domain_names.get(&domain.name), Some(&(index as u32)));
            for (member, slot) in domain.members.iter().enumerate() {
                let Some(slot) = slot else { continue };
                let gpu = self.gpus[*slot as usize].as_ref();
                let place = gpu.map(|gpu| (gpu.domain as usize, gpu.member as usize));
                assert_eq!(place, Some((index, member)));
                assert_eq!(gpu.and_then(|gpu| self.gpu_ids.get(&gpu.id)), Some(slot));
                num_members += 1;
            }
        }
        assert_eq!(num_members, self.gpu_ids.len());
    }

    fn check_index(&self) {
        for index in self
            .by_run
            .iter()
            .chain(&self.by_total)
            .chain([&self.by_capacity])
        {
            index.check_integrity(&self.classes);
        }
        for gpu in self.gpus.iter().flatten() {
            let domain = self.domains[gpu.domain as usize].as_ref();
            assert_eq!(
                domain.map(|domain| domain.is_draining),
                Some(gpu.is_draining)
            );
            let member = gpu.member as usize;
            for (priority, room) in gpu.memory.rooms().into_iter().enumerate() {
                let (longest, total) = if gpu.is_usable() {
                    (room.longest, room.total)
                } else {
                    (0, 0)
                };
                assert_eq!(
                    self.by_run[priority].domain_rooms(gpu.domain)[member],
                    longest
                );
                assert_eq!(
                    self.by_total[priority].domain_rooms(gpu.domain)[member],
                    total
                );
            }
            let capacity = self.by_capacity.domain_rooms(gpu.domain)[member];
            assert_eq!(capacity, gpu.memory.capacity());
        }
    }
}
