//! Civil dates in the proleptic Gregorian calendar, UTC.

const DAY_S: i64 = 86_400;

/// A date and time of day. Sunday is weekday 1, as the clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: u16,
    pub(super) month: u8,
    pub(super) day: u8,
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn month_days(year: i64, month: u8) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to the first day of a year from 1 on.
fn days_before_year(year: i64) -> i64 {
    let past = year - 1;
    past * 365 + past / 4 - past / 100 + past / 400 - 719_162
}

fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

impl DateTime {
    /// From seconds since 1970-01-01, held within the years 1970 to 9999.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(0, days_before_year(10_000) * DAY_S - 1);
        let (days, of_day) = (seconds / DAY_S, seconds % DAY_S);
        // At most one year too far: 400 years have 146,097 days.
        let mut year = 1970 + days * 400 / 146_097;
        if days_before_year(year) > days {
            year -= 1;
        } else if days_before_year(year + 1) <= days {
            year += 1;
        }
        let mut day = days - days_before_year(year);
        let mut month = 1;
        while day >= month_days(year, month) {
            day -= month_days(year, month);
            month += 1;
        }
        Self {
            year: u16::try_from(year).unwrap_or(0),
            month,
            day: small(day + 1),
            // 1970-01-01 was a Thursday.
            weekday: small((days + 4) % 7 + 1),
            hour: small(of_day / 3600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
        }
    }

    /// Seconds since 1970-01-01; `None` when it isn't a date from then on. The weekday isn't
    /// looked at.
    pub(super) fn to_unix(self) -> Option<i64> {
        let year = i64::from(self.year);
        let valid = (1970..10_000).contains(&year)
            && (1..=12).contains(&self.month)
            && (1..=month_days(year, self.month)).contains(&i64::from(self.day))
            && self.hour < 24
            && self.minute < 60
            && self.second < 60;
        valid.then(|| {
            let months: i64 = (1..self.month).map(|month| month_days(year, month)).sum();
            let days = days_before_year(year) + months + i64::from(self.day) - 1;
            let minutes = i64::from(self.hour) * 60 + i64::from(self.minute);
            days * DAY_S + minutes * 60 + i64::from(self.second)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        // From `date -u -d @N`.
        for (unix, text) in [
            (0, (1970, 1, 1, 5, 0, 0, 0)),
            (951_782_400, (2000, 2, 29, 3, 0, 0, 0)),
            (1_735_689_599, (2024, 12, 31, 3, 23, 59, 59)),
            (4_102_444_800, (2100, 1, 1, 6, 0, 0, 0)),
        ] {
            let time = DateTime::from_unix(unix);
            let found = (
                time.year,
                time.month,
                time.day,
                time.weekday,
                time.hour,
                time.minute,
                time.second,
            );
            assert_eq!(found, text);
            assert_eq!(time.to_unix(), Some(unix));
        }
    }

    #[test]
    fn every_day_converts_there_and_back() {
        let mut weekday = 5;
        for day in 0..days_before_year(2500) {
            let time = DateTime::from_unix(day * DAY_S);
            assert_eq!(time.to_unix(), Some(day * DAY_S));
            assert_eq!(time.weekday, weekday, "{time:?}");
            weekday = weekday % 7 + 1;
        }
    }

    #[test]
    fn extremes_are_held_and_nonsense_is_refused() {
        assert_eq!(DateTime::from_unix(i64::MIN).year, 1970);
        assert_eq!(DateTime::from_unix(i64::MAX).year, 9999);
        let good = DateTime::from_unix(0);
        for bad in [
            DateTime { month: 13, ..good },
            DateTime { month: 0, ..good },
            DateTime { day: 0, ..good },
            DateTime {
                month: 2,
                day: 29,
                ..good
            },
            DateTime { hour: 24, ..good },
            DateTime { year: 1969, ..good },
        ] {
            assert_eq!(bad.to_unix(), None, "{bad:?}");
        }
    }
}
