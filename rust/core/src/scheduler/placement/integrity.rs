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
                assert_eq!(
                    held.map(|held| held.domain),
                    Some(gpu.domain),
                    "a gang spans domains"
                );
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
            if let Some(at) = held.expires_at {
                assert!(self.expiries.contains(&(at, id)));
            }
        }
        assert!(slots.is_empty(), "a piece outlived its placement");
        let expiring = self.held.values().filter(|held| held.expires_at.is_some());
        assert_eq!(expiring.count(), self.expiries.len());
        self.check_registry();
        self.check_index();
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
