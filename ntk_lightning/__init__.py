"""PyTorch Lightning modules for one question: how far does the NTK explain a real network's generalization?"""
