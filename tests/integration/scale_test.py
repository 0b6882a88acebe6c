"""Many instances: none is lost, mixed up or left out of a list. How fast: benchmarks/scale."""

import random
import unittest

import torch
from harness.layer import Layer
from harness.many import STATE_BYTES, fill_store, name_of
from harness.server import Server
from harness.tensors import state_dict
from normd.v1 import norm_service_pb2 as pb

COUNT = 20_000


class Many(unittest.TestCase):
    def test_twenty_thousand_come_back_each_itself_and_are_listed_once_and_in_order(self):
        server = Server("--checkpoint_interval=1h", "--durability=update")
        self.addCleanup(server.close)
        fill_store(server.state_dir, COUNT)
        server.start()
        self.assertEqual(server.stub.GetServerInfo(pb.GetServerInfoRequest()).instance_count, COUNT)
        names, token = [], ""
        while token or not names:
            page = server.stub.ListInstances(pb.ListInstancesRequest(page_size=1000,
                                                                     page_token=token))
            names += [instance.name for instance in page.instances]
            token = page.next_page_token
        self.assertEqual(names, [name_of(number) for number in range(COUNT)])
        page = server.stub.ListInstances(pb.ListInstancesRequest(name_prefix="net/layer00123"))
        self.assertEqual([each.name for each in page.instances],
                         [name_of(number) for number in range(12_300, 12_400)])

        numbers = random.Random(1).sample(range(COUNT), 50)
        for number in numbers:
            answer = server.stub.GetState(pb.GetStateRequest(name=name_of(number)))
            mean = state_dict(answer.state.state_dict)["running_mean"]
            # What fill_store wrote: another one for each of a thousand neighbours.
            due = (torch.arange(64, dtype=torch.float64) + number % 1000 / 1000).float()
            self.assertTrue(torch.equal(mean, due), number)
        for number in numbers:
            Layer(server.stub, name_of(number)).forward(torch.randn(2, 64, 2, 2))
        server.kill()
        server.start()
        found = {number: server.stub.GetInstance(pb.GetInstanceRequest(name=name_of(number)))
                 for number in [*numbers, *range(100)]}
        for number, answer in found.items():
            self.assertEqual(answer.instance.num_batches_tracked, 2 if number in numbers else 1)
        server.kill()  # a shutdown would write a file for each
        server.start()


if __name__ == "__main__":
    unittest.main()
