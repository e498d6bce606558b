//! Today's date for chat templates, in UTC.

use std::time::{Duration, SystemTime};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];
const SECONDS_PER_DAY: u64 = 86_400;

/// Formats `now` with the `strftime` codes that templates use; others stay as they are.
pub(super) fn strftime(format: &str, now: SystemTime) -> String {
    let instant = Instant::of(now);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        match characters.next() {
            Some('%') | None => out.push('%'),
            Some(code) => match instant.field(code) {
                Some(field) => out.push_str(&field),
                None => out.extend(['%', code]),
            },
        }
    }
    out
}

/// A moment as a calendar and a clock show it.
struct Instant {
    year: u64,
    /// From 0.
    month: usize,
    day: u64,
    weekday: &'static str,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Instant {
    fn of(now: SystemTime) -> Self {
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH);
        let seconds = since_epoch.unwrap_or(Duration::ZERO).as_secs();
        let days = seconds / SECONDS_PER_DAY;
        let (year, month, day) = date_of(days);
        Self {
            year,
            month,
            day,
            weekday: WEEKDAYS[(days % 7) as usize],
            hour: seconds / 3600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    fn field(&self, code: char) -> Option<String> {
        let Self {
            year,
            month,
            day,
            weekday,
            hour,
            minute,
            second,
        } = *self;
        let number = month + 1;
        let hour_of_12 = (hour + 11) % 12 + 1;
        Some(match code {
            'Y' => format!("{year:04}"),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{number:02}"),
            'B' => MONTHS[month].to_owned(),
            'b' | 'h' => MONTHS[month][..3].to_owned(),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => format!("{hour:02}"),
            'I' => format!("{hour_of_12:02}"),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'F' => format!("{year:04}-{number:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            _ => return None,
        })
    }
}

/// Year, month from 0, and day of the month from 1, for days since 1970-01-01.
fn date_of(days: u64) -> (u64, usize, u64) {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // 400 years are 146,097 days; the loops below run at most 400 and 12 times.
    let mut year = 1970 + days / 146_097 * 400;
    let mut day = days % 146_097;
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn formats_known_instants() {
        assert_eq!(strftime("%d %b %Y", at(0)), "01 Jan 1970");
        // `date -u -d @1709210096` and the last second of a leap year.
        assert_eq!(
            strftime("%A %d %B %Y, %I:%M %p|%F %T|100%%|%q|%", at(1_709_210_096)),
            "Thursday 29 February 2024, 12:34 PM|2024-02-29 12:34:56|100%|%q|%"
        );
        assert_eq!(
            strftime("%a %F %T", at(1_735_689_599)),
            "Tue 2024-12-31 23:59:59"
        );
        assert_eq!(strftime("%F %a", at(4_107_542_400)), "2100-03-01 Mon");
    }
}
