"""What every `Device` keeps to where what broke is zeroed."""

from __future__ import annotations

from device_groups import NewDevice, begin, extent, group, holds, move, shows


class WipeConformance:
    def test_what_is_wiped_is_zero(self, new_device: NewDevice) -> None:
        """Its bytes alone; rows that name them are another call's."""
        device, gone, stays = new_device(), group(1, [0, 1]), group(2, [2, 3])
        device.open()
        move(device, gone, extent(0), 0)
        move(device, gone, extent(2), 0)
        move(device, stays, extent(1), 1)
        assert device.wipe([extent(0), extent(2)]).result(10) is None
        for place in (extent(0), extent(2)):
            assert not device.view(place).cpu().any()
        shows(device, stays, extent(1))
        holds(device, 1, stays.weights)

    def test_wiping_is_one_of_what_takes_effect_in_order(self, new_device: NewDevice) -> None:
        """Nobody waits in between."""
        device, groups = new_device(), [group(n, [0, 1]) for n in range(3)]
        device.open()
        begun = [begin(device, groups[0], extent(0), 0), device.wipe([extent(0), extent(1)])]
        begun += [begin(device, groups[1], extent(0), 0), begin(device, groups[2], extent(1), 1)]
        begun += [device.wipe([extent(1)]), device.wipe([])]
        for ticket in begun:
            ticket.result(10)
        holds(device, 0, groups[1].weights)
        assert not device.view(extent(1)).cpu().any()
