//! Which twin of a kernel runs.

/// A kind of processor that kernels are compiled for, and that this one is: there is no other way to have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Portable,
    /// AVX2 and fused multiply-add: x86-64 since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 (F, VL, DQ and BW) besides.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Processor {
    /// What every processor is.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The fastest kind that this processor is.
    #[must_use]
    pub fn here() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if super::avx512::is_here() {
                return Self(Kind::Avx512);
            }
            if super::avx2::is_here() {
                return Self(Kind::Avx2);
            }
        }
        Self::PORTABLE
    }

    /// All kinds that this processor is.
    #[must_use]
    pub fn all_here() -> Vec<Self> {
        let mut all = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        if super::avx2::is_here() {
            all.push(Self(Kind::Avx2));
        }
        let fastest = Self::here();
        if !all.contains(&fastest) {
            all.push(fastest);
        }
        all
    }

    pub(crate) const fn kind(self) -> Kind {
        self.0
    }
}
