//! The corridor from a request to its tokens, against workers that speak the real protocol over real sockets and do
//! exactly what each test says.

mod admission;
#[cfg(test)]
mod chaos;
#[cfg(test)]
mod checks;
#[cfg(test)]
mod keepers;
#[cfg(test)]
mod losses;
mod membership;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod pauses;
#[cfg(test)]
mod queue;
#[cfg(test)]
mod replay;
mod streams;
#[cfg(test)]
mod support;

#[cfg(test)]
#[expect(dead_code, reason = "shared with the unit tests, which use more of it")]
#[path = "../../src/text/fixtures.rs"]
mod fixtures;
