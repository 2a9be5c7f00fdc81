//! Numbered places for things that come and go.

/// A place and how often it was reused: a stale one finds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Id {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// Generations wrap at 24 bits: they travel in an epoll token.
const GENERATION_MASK: u32 = 0x00ff_ffff;

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    value: Option<T>,
}

/// Values by [`Id`].
#[derive(Debug)]
pub(crate) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(crate) fn insert_with(&mut self, make: impl FnOnce(Id) -> T) -> Id {
        if let Some(index) = self.free.pop() {
            let place = &mut self.places[index as usize];
            let id = Id {
                index,
                generation: place.generation,
            };
            place.value = Some(make(id));
            return id;
        }
        let id = Id {
            index: u32::try_from(self.places.len()).unwrap_or(u32::MAX),
            generation: 0,
        };
        self.places.push(Place {
            generation: 0,
            value: Some(make(id)),
        });
        id
    }

    pub(crate) fn insert(&mut self, value: T) -> Id {
        self.insert_with(|_| value)
    }

    pub(crate) fn get(&self, id: Id) -> Option<&T> {
        let place = self.places.get(id.index as usize)?;
        (place.generation == id.generation).then_some(())?;
        place.value.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let place = self.places.get_mut(id.index as usize)?;
        (place.generation == id.generation).then_some(())?;
        place.value.as_mut()
    }

    pub(crate) fn remove(&mut self, id: Id) -> Option<T> {
        let place = self.places.get_mut(id.index as usize)?;
        (place.generation == id.generation).then_some(())?;
        let value = place.value.take()?;
        place.generation = (place.generation + 1) & GENERATION_MASK;
        self.free.push(id.index);
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.places.iter().enumerate().filter_map(|(index, place)| {
            let id = Id {
                index: u32::try_from(index).unwrap_or(u32::MAX),
                generation: place.generation,
            };
            place.value.as_ref().map(|value| (id, value))
        })
    }

    pub(crate) fn ids(&self) -> Vec<Id> {
        self.iter().map(|(id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_id_finds_nothing() {
        let mut slab = Slab::default();
        let one = slab.insert("one");
        let two = slab.insert("two");
        assert_eq!(slab.remove(one), Some("one"));
        assert_eq!(slab.remove(one), None);
        let three = slab.insert("three");
        assert_eq!((three.index, slab.len()), (one.index, 2));
        assert_eq!(slab.get(one), None);
        assert_eq!(slab.get(three), Some(&"three"));
        assert_eq!(slab.ids(), [three, two]);
    }
}
